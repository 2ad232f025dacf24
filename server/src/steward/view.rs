//! The cluster as a node's steward saw it last, for who only wants to know: the HTTP twin of ROUTE, the admin endpoint, and by
//! that `ringline cluster`. Written by the side thread, read by the others; each view is whole and never changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use ringline_cluster::membership::Standing;
use ringline_cluster::ownership::Ownership;
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::reconcile::{Holding, Start};
use ringline_cluster::router::Board;
use serde_json::{Value, json};
use tokio::sync::watch as changing;

use super::{Deeds, Own};
use crate::etcd::entry::Listing;
use crate::etcd::lease::LeaseClock;

/// How it is with a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The node that should own it does, or nobody else could.
    Served,
    /// A living node owns it and another should: it is to be handed over.
    Moving,
    /// Its owner is not there any more: it waits to be taken.
    Orphaned,
    /// Nobody owns it.
    Free,
}

impl State {
    /// As commands and their JSON say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Moving => "moving",
            Self::Orphaned => "orphaned",
            Self::Free => "free",
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct View {
    pub own: Own,
    pub deeds: Deeds,
    pub listing: Listing,
    /// By partition: who should own it; `None`: nobody may.
    pub wanted: Vec<Option<NodeIndex>>,
    /// What the cores of this node were told.
    pub told: Arc<Ownership>,
    /// The database and etcd could both be read at the last look.
    pub is_current: bool,
}

impl Default for View {
    /// Before the first look.
    fn default() -> Self {
        let own = Own { name: String::new(), number: NodeIndex(0), start: Start::NOBODY };
        let (deeds, listing, told) = (Deeds::default(), Listing::default(), Arc::new(Ownership::new(0)));
        Self { own, deeds, listing, wanted: Vec::new(), told, is_current: false }
    }
}

impl View {
    /// Whether it shows just this.
    pub(super) fn is_of(&self, (deeds, listing): (&Deeds, &Listing), told: &Arc<Ownership>, is_current: bool) -> bool {
        let nodes = self.listing.entries == listing.entries && self.listing.unreadable == listing.unreadable;
        let same = nodes && self.listing.drained == listing.drained && self.deeds == *deeds;
        same && Arc::ptr_eq(&self.told, told) && self.is_current == is_current
    }

    /// Name of the node whose start that is; whether it may be alive.
    fn owner(&self, start: Start) -> Option<(&str, bool)> {
        let (name, _) = self.deeds.starts.get(&start)?;
        Some((name, self.listing.may_live(name, start)))
    }

    fn name_of(&self, number: NodeIndex) -> Option<&str> {
        let found = self.listing.entries.iter().find(|(_, entry)| entry.number == number);
        found.map(|(name, _)| name.as_str())
    }

    /// Who owns it, who should, and what follows from that.
    fn place(&self, row: &Holding) -> (Option<&str>, Option<&str>, State) {
        let wanted = self.wanted.get(usize::from(row.partition.number())).copied().flatten();
        let wanted = wanted.and_then(|number| self.name_of(number));
        match (row.owner != Start::NOBODY).then(|| self.owner(row.owner)) {
            None => (None, wanted, State::Free),
            Some(None) => (None, wanted, State::Orphaned),
            Some(Some((name, false))) => (Some(name), wanted, State::Orphaned),
            Some(Some((name, true))) => {
                let state = if wanted.is_none_or(|wanted| wanted == name) { State::Served } else { State::Moving };
                (Some(name), wanted, state)
            }
        }
    }

    /// `GET /partitions`: one object a partition.
    pub fn partitions(&self) -> Value {
        let partition = |row: &Holding| {
            let (owner, wanted, state) = self.place(row);
            let (number, state) = (row.partition.number(), state.name());
            json!({ "partition": number, "epoch": row.epoch, "owner": owner, "wanted": wanted, "state": state })
        };
        let rows: Vec<_> = self.deeds.rows.iter().map(partition).collect();
        json!({ "node": self.own.name, "current": self.is_current, "partitions": rows })
    }

    /// The nodes of `GET /cluster`, this one among them, with the clients that are on the board.
    pub fn nodes(&self, board: &Board) -> Value {
        let mut counts: BTreeMap<&str, (u16, u16)> = BTreeMap::new();
        for row in &self.deeds.rows {
            let (owner, wanted, _) = self.place(row);
            if let Some(owner) = owner {
                counts.entry(owner).or_default().0 += 1;
            }
            if let Some(wanted) = wanted {
                counts.entry(wanted).or_default().1 += 1;
            }
        }
        let members = self.listing.members();
        let nodes = self.listing.entries.iter().map(|(name, entry)| {
            let (owned, wanted) = counts.get(name.as_str()).copied().unwrap_or_default();
            let is_own = *name == self.own.name;
            let clients = if is_own { board.clients() } else { board.clients_of(entry.number) };
            let standing = members.get(name).map_or(entry.member.standing, |member| member.standing);
            json!({
                "node": name, "number": entry.number.0, "own": is_own, "clients_at": entry.member.client_address,
                "weight": entry.member.weight, "client_weight": entry.member.client_weight, "clients": clients,
                "partitions": owned, "wanted": wanted, "standing": standing_name(standing),
                "drained": self.listing.drained.contains(name),
            })
        });
        nodes.collect()
    }
}

fn standing_name(standing: Standing) -> &'static str {
    match standing {
        Standing::Up => "up",
        Standing::Draining => "draining",
        Standing::Away => "away",
    }
}

/// What looks at the views.
#[derive(Clone, Debug)]
pub struct Watching {
    pub view: changing::Receiver<Arc<View>>,
    pub clock: LeaseClock,
    /// The number of this node.
    pub own: NodeIndex,
}

impl Watching {
    pub fn now(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Whether this node may serve: its lease is certain.
    pub fn may_serve(&self) -> bool {
        !self.clock.is_over(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::entry::Entry;
    use ringline_cluster::link::hello::Incarnation;
    use ringline_cluster::membership::Member;
    use ringline_schema::ids::Partition;

    fn entry(number: u16, start: i64) -> Entry {
        let member = Member {
            incarnation: Incarnation(start.unsigned_abs()),
            peer_address: ([127, 0, 0, 1], 9_800 + number).into(),
            client_address: format!("n{number}:1"),
            weight: 1,
            client_weight: 2,
            connections: 0,
            standing: Standing::Up,
        };
        Entry { member, start: Start(start), number: NodeIndex(number), owned: None }
    }

    /// a and b are there, c has died; partitions 0 to 4 in each state.
    fn view() -> View {
        let starts = [(1, "a", 0), (2, "b", 5), (3, "c", 9)];
        let row = |(at, owner): (u16, i64)| Holding {
            partition: Partition::new(at).unwrap(),
            epoch: i64::from(at) + 10,
            owner: Start(owner),
        };
        let mut view = View { own: Own { name: "a".into(), number: NodeIndex(0), start: Start(1) }, ..View::default() };
        view.deeds.rows = (0..).zip([1, 2, 3, 0, 7]).map(row).collect();
        let start = |(start, name, number): (i64, &str, u16)| (Start(start), (name.to_owned(), NodeIndex(number)));
        view.deeds.starts = starts.into_iter().map(start).collect();
        view.listing.entries = [("a".into(), entry(0, 1)), ("b".into(), entry(5, 2))].into();
        view.wanted = [Some(0), Some(0), Some(5), Some(5), None].map(|number| number.map(NodeIndex)).to_vec();
        view
    }

    #[test]
    fn each_partition_has_its_state() {
        let mut view = view();
        fn states(view: &View) -> Vec<(Option<&str>, Option<&str>, State)> {
            view.deeds.rows.iter().map(|row| view.place(row)).collect()
        }
        assert_eq!(
            states(&view),
            [
                (Some("a"), Some("a"), State::Served),
                (Some("b"), Some("a"), State::Moving),
                (Some("c"), Some("b"), State::Orphaned),
                (None, Some("b"), State::Free),
                (None, None, State::Orphaned),
            ]
        );
        let json = view.partitions();
        assert_eq!(json["partitions"][1]["state"], "moving");
        assert_eq!((&json["partitions"][2]["epoch"], &json["partitions"][3]["owner"]), (&12.into(), &Value::Null));
        view.wanted = vec![None; 5];
        assert_eq!(states(&view)[1].2, State::Served, "better than nobody");
    }

    #[test]
    fn nodes_are_shown_with_what_they_own_and_the_clients_on_the_board() {
        let mut view = view();
        view.listing.drained = ["b".to_owned()].into();
        let board = Board::new(1);
        board.count(0, 4);
        board.report(NodeIndex(5), 9);
        let nodes = view.nodes(&board);
        let told = |at: usize, key: &str| nodes[at][key].clone();
        assert_eq!((told(0, "node"), told(0, "clients"), told(0, "own")), ("a".into(), 4.into(), true.into()));
        assert_eq!((told(0, "partitions"), told(0, "wanted"), told(0, "standing")), (1.into(), 2.into(), "up".into()));
        assert_eq!(
            (told(1, "clients"), told(1, "standing"), told(1, "drained")),
            (9.into(), "draining".into(), true.into())
        );
    }
}
