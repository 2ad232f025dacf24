//! The admin endpoint: metrics, health, version and the cluster over HTTP, for people and for Prometheus. Owned by a thread of its
//! own ([`http`]).
//!
//! Nothing on the way of a message is shared with it: it asks each core for a [`snapshot`] when it is itself asked, and
//! [`metrics`] makes the text. Bounded: at most [`CONNECTIONS_MAX`] clients at once, the next waits to be accepted; one
//! question to the cores at a time. There is no password: it belongs on loopback.

pub mod metrics;
pub mod snapshot;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ringline_cluster::router::Board;
use tokio::sync::Mutex;

use self::metrics::Scrape;
use self::snapshot::{Answer, Desk};
use crate::boot::BootError;
use crate::http::{self, Bounds, Endpoint};
use crate::steward::view::Watching;

/// Clients served at once.
pub const CONNECTIONS_MAX: usize = 32;
/// What is answered to any other path.
const PAGES: &str = "there is /metrics, /healthz, /version, /cluster and /partitions\n";
/// What a node answers whose partitions stay where they are.
const NOTHING_MOVES: &str = "UNSUPPORTED: cluster.mode of this node is not etcd, its partitions stay where they are\n";
/// The content type of OpenMetrics text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where nodes come and go: what is known of them.
#[derive(Clone, Debug)]
pub struct Nodes {
    pub watching: Watching,
    pub board: Arc<Board>,
}

/// What is told without asking the cores.
#[derive(Clone, Debug)]
pub struct Facts {
    pub kernel: String,
    /// How sockets are served.
    pub net: &'static str,
    /// Numbers of the cores that run a shard, in order of shard.
    pub cores: Vec<usize>,
    /// `None`: nodes of a configuration, or a node alone.
    pub nodes: Option<Nodes>,
}

/// Takes the address. Errors: [`BootError::AdminListen`].
pub fn bind(address: SocketAddr) -> Result<TcpListener, BootError> {
    http::bind(address).map_err(|error| BootError::AdminListen(address, error))
}

/// Starts the thread. Errors: [`BootError::System`].
pub fn start(listener: TcpListener, desk: Desk, facts: Facts) -> Result<Endpoint, BootError> {
    let failed = |error| BootError::System { what: "the admin endpoint", error };
    let address = listener.local_addr().map_err(failed)?;
    if !address.ip().is_loopback() {
        tracing::warn!("admin.listen {address} can be reached from outside this machine, and asks for no password");
    }
    tracing::info!("metrics on http://{address}/metrics");
    let site = Arc::new(Site { desk: Mutex::new(desk), facts });
    let bounds = Bounds { clients_max: CONNECTIONS_MAX, life: None };
    http::start("admin", listener, router(site), bounds).map_err(failed)
}

/// What the routes share.
struct Site {
    desk: Mutex<Desk>,
    facts: Facts,
}

impl Site {
    async fn ask(&self) -> Vec<Answer> {
        self.desk.lock().await.ask().await
    }
}

fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(health_page))
        .route("/version", get(version_page))
        .route("/cluster", get(cluster_page))
        .route("/partitions", get(partitions_page))
        .fallback(|| async { (StatusCode::NOT_FOUND, PAGES) })
        .with_state(site)
}

async fn metrics_page(State(site): State<Arc<Site>>) -> Response {
    match Scrape::new(site.ask().await).encode() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n").into_response(),
    }
}

async fn health_page(State(site): State<Arc<Site>>) -> (StatusCode, String) {
    health(&site.ask().await)
}

/// 200 when every core serves and may store; otherwise 503 with a line for each that does not.
fn health(answers: &[Answer]) -> (StatusCode, String) {
    let mut reasons = String::new();
    for (shard, snapshot) in answers {
        let reason = match snapshot {
            None => "does not answer",
            Some(snapshot) if snapshot.store_failed => "its store failed: nothing durable is accepted",
            Some(snapshot) if snapshot.disk_full => "its disk is full: durable messages are refused",
            Some(snapshot) if snapshot.store_away => "its database is away: durable messages are refused",
            Some(snapshot) if snapshot.draining => "is stopping",
            Some(_) => continue,
        };
        reasons.push_str(&format!("core {}: {reason}\n", shard.0));
    }
    if reasons.is_empty() { (StatusCode::OK, "ok\n".into()) } else { (StatusCode::SERVICE_UNAVAILABLE, reasons) }
}

async fn version_page(State(site): State<Arc<Site>>) -> Response {
    let Facts { kernel, net, cores, nodes: _ } = &site.facts;
    let version = env!("CARGO_PKG_VERSION");
    let json = serde_json::json!({ "version": version, "kernel": kernel, "net": net, "cores": cores });
    ([(header::CONTENT_TYPE, "application/json")], format!("{json}\n")).into_response()
}

/// The links of every core, none of a node alone; and where nodes come and go, the nodes.
async fn cluster_page(State(site): State<Arc<Site>>) -> Response {
    let answers = site.ask().await;
    let links = answers.iter().flat_map(|(shard, snapshot)| {
        let links = snapshot.as_ref().and_then(|snapshot| snapshot.peers.as_ref()).map(|peers| &peers.links);
        links.into_iter().flatten().map(|link| link.to_json(shard.0))
    });
    let mut json = serde_json::json!({ "links": links.collect::<Vec<_>>() });
    if let Some(Nodes { watching, board }) = &site.facts.nodes {
        let view = watching.now();
        json["nodes"] = view.nodes(board);
        json["current"] = view.is_current.into();
    }
    ([(header::CONTENT_TYPE, "application/json")], format!("{json}\n")).into_response()
}

/// Who owns what, as the steward saw it last.
async fn partitions_page(State(site): State<Arc<Site>>) -> Response {
    let Some(Nodes { watching, .. }) = &site.facts.nodes else {
        return (StatusCode::NOT_IMPLEMENTED, NOTHING_MOVES).into_response();
    };
    let json = watching.now().partitions();
    ([(header::CONTENT_TYPE, "application/json")], format!("{json}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_cluster::placement::ShardIndex;

    #[test]
    fn health_names_every_core_that_does_not_serve() {
        let core = |number, change: fn(&mut snapshot::Snapshot)| -> Answer {
            let mut own = snapshot::tests::snapshot(number);
            change(&mut own);
            (ShardIndex(number), Some(Box::new(own)))
        };
        let (code, text) = health(&[core(0, |_| ()), core(1, |_| ())]);
        assert_eq!((code, text.as_str()), (StatusCode::OK, "ok\n"));
        let ill = [
            core(0, |_| ()),
            core(1, |own| own.store_failed = true),
            (ShardIndex(2), None),
            core(3, |own| own.draining = true),
            core(4, |own| own.store_away = true),
        ];
        let (code, text) = health(&ill);
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() == 4 && lines[0].starts_with("core 1: its store failed"), "{text}");
        assert_eq!(lines[1..3], ["core 2: does not answer", "core 3: is stopping"]);
        assert_eq!(lines[3], "core 4: its database is away: durable messages are refused");
    }
}
