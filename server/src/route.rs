//! ROUTE as the shell has it: the board that all cores look at, and the HTTP twin, `GET /route?user=NAME`, for what has no
//! client of ours at hand: a proxy, a script, an application that picks addresses itself. Owned by a thread of its own
//! ([`http`]).
//!
//! The twin is for clients, so it is not the admin endpoint, tells nothing but a node's name and its address, and asks no
//! core: it goes by what it shares with them, the list of nodes or what the steward saw last, and the board. Bounded: [`CLIENTS_MAX`] at once, each for
//! [`LIFE`] at most. Answers are one JSON object: 200 `{"node", "address"}`, and 400 or 503 `{"error", "text"}` under the
//! names of [`ErrorCode`]; what to do about a 503 is to ask again, here or at another node.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router as Pages;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use percent_encoding::percent_decode_str;
use ringline_cluster::balance::Strategy;
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::router::{Board, Router};
use ringline_core::config::{ClusterConfig, RouteConfig};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::UserName;

use crate::boot::BootError;
use crate::config::Config;
use crate::http::{self, Bounds, Endpoint};
use crate::steward::view::Watching;
use crate::stop::{Control, Phase};

/// Clients served at once.
pub const CLIENTS_MAX: usize = 64;
/// The longest that one of them may stay.
pub const LIFE: Duration = Duration::from_secs(5);

/// What every core routes by, with the weights of the configuration on its board; with etcd the steward puts them up. `cores`:
/// of this node.
pub fn settings(config: &Config, cluster: Option<&ClusterConfig>, cores: usize) -> RouteConfig {
    let board = Board::new(cores);
    let names = cluster.map_or(&[][..], |cluster| &cluster.nodes);
    for (at, (name, _)) in names.iter().enumerate() {
        if let Some(node) = config.cluster_nodes.iter().find(|node| node.name == *name) {
            board.set_weight(NodeIndex(at as u16), node.client_weight);
            board.set_gateway(NodeIndex(at as u16), node.weight == 0);
        }
    }
    if cluster.is_some() && config.cluster_route != Strategy::ConsistentHash {
        let strategy = config.cluster_route;
        tracing::info!("ROUTE goes by {strategy}: who does not live on the node that it names is sent on at LOGIN");
    }
    RouteConfig { strategy: config.cluster_route, board: Arc::new(board) }
}

/// Takes the address of the twin; `None`: it is not wanted. Errors: [`BootError::RouteListen`].
pub fn bind(config: &Config) -> Result<Option<TcpListener>, BootError> {
    let refused = |address: SocketAddr| move |error| BootError::RouteListen(address, error);
    config.cluster_route_listen.map(|address| http::bind(address).map_err(refused(address))).transpose()
}

/// Who there is, and who owns what.
pub enum Owners {
    /// A node alone.
    Alone,
    /// The nodes of the configuration.
    Listed(ClusterConfig),
    /// As the steward saw it last.
    Moving(Watching),
}

impl Owners {
    /// Of a node in this cluster, where nodes come and go if somebody watches them.
    pub fn of(cluster: Option<ClusterConfig>, watching: Option<Watching>) -> Self {
        match (cluster, watching) {
            (_, Some(watching)) => Self::Moving(watching),
            (Some(cluster), None) => Self::Listed(cluster),
            (None, None) => Self::Alone,
        }
    }
}

/// What the twin answers from.
pub struct Twin {
    /// Name and address of this node.
    own: (String, String),
    owners: Owners,
    board: Arc<Board>,
    router: Mutex<Router>,
    control: Arc<Control>,
}

impl Twin {
    /// `own`: name and client address of this node.
    pub fn new(own: (String, String), owners: Owners, route: &RouteConfig, control: Arc<Control>) -> Self {
        let board = Arc::clone(&route.board);
        let router = Mutex::new(Router::new(route.strategy, Arc::clone(&board), rand::random()));
        Self { own, owners, board, router, control }
    }

    /// Serves it. Errors: [`BootError::System`].
    pub fn serve(self, listener: TcpListener) -> Result<Endpoint, BootError> {
        let failed = |error| BootError::System { what: "the HTTP twin of ROUTE", error };
        tracing::info!("routes on http://{}/route", listener.local_addr().map_err(failed)?);
        let pages = Pages::new()
            .route("/route", get(route_page))
            .fallback(|| async { (StatusCode::NOT_FOUND, "there is /route?user=NAME\n") })
            .with_state(Arc::new(self));
        let bounds = Bounds { clients_max: CLIENTS_MAX, life: Some(LIFE) };
        http::start("route", listener, pages, bounds).map_err(failed)
    }

    /// Name and address of the node for a user, of any without one. As ROUTE.
    fn pick(&self, user: Option<&UserName>) -> Result<(String, String), ErrorCode> {
        let serving = self.control.phase() == Phase::Running;
        match &self.owners {
            Owners::Alone if serving => Ok(self.own.clone()),
            Owners::Alone => Err(ErrorCode::ShuttingDown),
            Owners::Listed(cluster) => {
                let own = cluster.placement.own();
                let home = user.map_or(Some(own), |user| cluster.placement.owner_of(user.partition()));
                let picked = self.among((own, serving), home, &mut cluster.placement.nodes())?;
                let named = picked.map(|node| cluster.nodes.get(usize::from(node.0)).cloned());
                named.unwrap_or_else(|| Some(self.own.clone())).ok_or(ErrorCode::Unavailable)
            }
            Owners::Moving(watching) => self.pick_moving(watching, user, serving),
        }
    }

    /// Where partitions change hands: one that is on its way has no node, and who can't be sure to be alive names nobody.
    fn pick_moving(
        &self,
        watching: &Watching,
        user: Option<&UserName>,
        serving: bool,
    ) -> Result<(String, String), ErrorCode> {
        if !watching.may_serve() {
            return Err(ErrorCode::Unavailable);
        }
        let (view, own) = (watching.now(), watching.own);
        let home = |user: &UserName| {
            let part = view.told.part(user.partition());
            part.owner.filter(|_| !part.giving)
        };
        let home = user.map_or(Some(own), home);
        let picked = self.among((own, serving), home, &mut view.told.nodes().map(|(node, _)| node))?;
        let named = picked.map(|node| view.told.node(node).map(|known| (known.name.clone(), known.address.clone())));
        named.unwrap_or_else(|| Some(self.own.clone())).ok_or(ErrorCode::Unavailable)
    }

    /// One of these nodes that can be reached; `None`: this one.
    fn among(
        &self,
        (own, serving): (NodeIndex, bool),
        home: Option<NodeIndex>,
        nodes: &mut dyn Iterator<Item = NodeIndex>,
    ) -> Result<Option<NodeIndex>, ErrorCode> {
        let open = |node: &NodeIndex| if *node == own { serving } else { self.board.is_up(*node) };
        // Held for one answer; the router has no state that half of one could spoil.
        let mut router = self.router.lock().unwrap_or_else(PoisonError::into_inner);
        let picked = router.pick(home, &mut nodes.filter(open)).ok_or(ErrorCode::Unavailable)?;
        Ok((picked != own).then_some(picked))
    }
}

async fn route_page(State(twin): State<Arc<Twin>>, RawQuery(query): RawQuery) -> Response {
    let user = asked_user(query.as_deref().unwrap_or_default());
    let (status, json) = match user.and_then(|user| twin.pick(user.as_ref())) {
        Ok((node, address)) => (StatusCode::OK, serde_json::json!({ "node": node, "address": address })),
        Err(code) => {
            let status = if code.retryable() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::BAD_REQUEST };
            (status, serde_json::json!({ "error": code.name(), "text": code.text() }))
        }
    };
    // Who is asked again a moment later may answer something else.
    let heads = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (status, heads, format!("{json}\n")).into_response()
}

/// The user that a query names; none is allowed, as in ROUTE. Errors: `BAD_NAME`, and `BAD_REQUEST` for anything but one
/// `user=NAME`.
fn asked_user(query: &str) -> Result<Option<UserName>, ErrorCode> {
    if query.is_empty() {
        return Ok(None);
    }
    let name = query.strip_prefix("user=").filter(|name| !name.contains('&')).ok_or(ErrorCode::BadRequest)?;
    let spaced = name.replace('+', " ");
    let name = percent_decode_str(&spaced).decode_utf8().map_err(|_| ErrorCode::BadName)?;
    if name.is_empty() { Ok(None) } else { UserName::of_user(&name).map(Some) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::lease::LeaseClock;
    use crate::steward::view::View;
    use ringline_cluster::ownership::{self, Known, Ownership, Part};
    use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
    use ringline_core::config::Lease;
    use std::time::Instant;
    use tokio::sync::watch as changing;

    fn user(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    #[test]
    fn queries_name_one_user_or_none_and_nothing_else() {
        assert_eq!(asked_user(""), Ok(None));
        assert_eq!(asked_user("user="), Ok(None));
        assert_eq!(asked_user("user=ann"), Ok(Some(user("ann"))));
        assert_eq!(asked_user("user=J%C3%B6rg+B"), Ok(Some(user("Jörg B"))));
        for bad in ["user", "name=ann", "user=ann&user=bob", "user=ann&x=1", "User=ann"] {
            assert_eq!(asked_user(bad), Err(ErrorCode::BadRequest), "{bad}");
        }
        for bad in ["user=%ff", "user=%00", "user=+", "user=%23team", &format!("user={}", "x".repeat(65))] {
            assert_eq!(asked_user(bad), Err(ErrorCode::BadName), "{bad}");
        }
    }

    fn twin(strategy: Strategy, names: &[&str]) -> Twin {
        let weights: Vec<_> = names.iter().map(|name| ((*name).to_owned(), 1)).collect();
        let nodes = names.iter().map(|name| ((*name).to_owned(), format!("{name}:1"))).collect();
        let cluster = (names.len() > 1).then(|| {
            let placement = ClusterPlacement::new("a", CorePlacement::new(1).unwrap(), &weights).unwrap();
            ClusterConfig { placement, nodes }
        });
        let route = RouteConfig { strategy, board: Arc::default() };
        let control = Arc::new(Control::new(Vec::new(), Duration::ZERO));
        Twin::new(("a".to_owned(), "a:1".to_owned()), Owners::of(cluster, None), &route, control)
    }

    #[test]
    fn it_answers_as_route_does() {
        let alone = twin(Strategy::RoundRobin, &["a"]);
        assert_eq!(alone.pick(None).unwrap().1, "a:1");
        alone.control.stop();
        assert_eq!(alone.pick(None), Err(ErrorCode::ShuttingDown));

        let owners = twin(Strategy::ConsistentHash, &["a", "b"]);
        let Owners::Listed(ClusterConfig { placement, .. }) = &owners.owners else { panic!("it is one of several") };
        let of = |node: u16| {
            let mut users = (0..).map(|at| user(&format!("user-{at}")));
            users.find(|user| placement.node_of(user.partition()) == NodeIndex(node)).unwrap()
        };
        let (here, there) = (of(0), of(1));
        assert_eq!(owners.pick(Some(&here)).unwrap().1, "a:1");
        assert_eq!(owners.pick(Some(&there)), Err(ErrorCode::Unavailable), "its node is away");
        owners.board.set_up(NodeIndex(1), true);
        assert_eq!(owners.pick(Some(&there)).unwrap().1, "b:1");
        assert_eq!(owners.pick(None).unwrap().1, "a:1");
        owners.control.stop();
        assert_eq!(owners.pick(Some(&there)).unwrap().1, "b:1");
        assert_eq!(owners.pick(Some(&here)), Err(ErrorCode::Unavailable));

        let turns = twin(Strategy::RoundRobin, &["a", "b", "c"]);
        turns.board.set_up(NodeIndex(1), true);
        let picked: Vec<_> = (0..4).map(|_| turns.pick(Some(&there)).unwrap().0).collect();
        assert_eq!(picked, ["a", "b", "a", "b"], "c is away, and where the user lives does not count");
        turns.board.set_up(NodeIndex(1), false);
        turns.control.stop();
        assert_eq!(turns.pick(None), Err(ErrorCode::Unavailable), "nobody is left");
    }

    /// Node 0 is this one, a; 7 is b. Users of the first partition are a's, of the second b's, of the third on their way from a.
    fn moving(strategy: Strategy) -> (Twin, changing::Sender<Arc<View>>, LeaseClock) {
        let mut told = Ownership::new(1);
        let part = |owner, giving| Part { owner: Some(NodeIndex(owner)), epoch: 1, giving };
        for (partition, part) in ownership::all().zip([part(0, false), part(7, false), part(0, true)]) {
            told.set(partition, part);
        }
        for (number, name) in [(0, "a"), (7, "b")] {
            told.name(NodeIndex(number), Known { name: name.into(), address: format!("{name}:1") });
        }
        let (sender, view) = changing::channel(Arc::new(View { told: Arc::new(told), ..View::default() }));
        let clock = LeaseClock::new(Instant::now(), Lease::new(0));
        let watching = Watching { view, clock: clock.clone(), own: NodeIndex(0) };
        let mut twin = twin(strategy, &["a"]);
        twin.owners = Owners::of(None, Some(watching));
        (twin, sender, clock)
    }

    #[test]
    fn where_partitions_change_hands_it_follows_what_was_seen_last() {
        let (owners, views, clock) = moving(Strategy::ConsistentHash);
        let of = |partition: u16| {
            let mut users = (0..).map(|at| user(&format!("user-{at}")));
            users.find(|user| user.partition().number() == partition).unwrap()
        };
        let [first, second, third] = [0, 1, 2].map(of);
        assert_eq!(owners.pick(Some(&first)), Err(ErrorCode::Unavailable), "its lease is not certain");
        clock.extend(Instant::now(), Duration::from_secs(3_600));
        assert_eq!(owners.pick(Some(&first)).unwrap().1, "a:1");
        assert_eq!(owners.pick(None).unwrap().1, "a:1");
        assert_eq!(owners.pick(Some(&second)), Err(ErrorCode::Unavailable), "b can't be reached");
        owners.board.set_up(NodeIndex(7), true);
        assert_eq!(owners.pick(Some(&second)).unwrap(), ("b".to_owned(), "b:1".to_owned()));
        assert_eq!(owners.pick(Some(&third)), Err(ErrorCode::Unavailable), "it is on its way");
        assert_eq!(owners.pick(Some(&of(3))), Err(ErrorCode::Unavailable), "nobody owns it");
        let mut told = (*views.borrow().told).clone();
        told.set(third.partition(), Part { owner: Some(NodeIndex(7)), epoch: 2, giving: false });
        views.send_replace(Arc::new(View { told: Arc::new(told), ..View::default() }));
        assert_eq!(owners.pick(Some(&third)).unwrap().1, "b:1");

        let (turns, _views, clock) = moving(Strategy::RoundRobin);
        clock.extend(Instant::now(), Duration::from_secs(3_600));
        turns.board.set_up(NodeIndex(7), true);
        turns.board.set_weight(NodeIndex(7), 3);
        let picked: Vec<_> = (0..8).map(|_| turns.pick(None).unwrap().0).collect();
        assert_eq!(picked.iter().filter(|name| *name == "b").count(), 6, "by the weights that nodes tell");
        turns.board.set_leaving(NodeIndex(7), true);
        assert!((0..4).all(|_| turns.pick(None).unwrap().0 == "a"), "b is being drained");
    }
}
