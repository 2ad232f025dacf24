//! Who belongs to the cluster now, and what follows from it. Pure; owned by the one thread that watches.
//!
//! Level-triggered: whoever watches hands in the whole list, again and again, from a configuration or from etcd, and what is
//! wanted is compared with what is there. A list that was missed does no harm, one that comes twice changes nothing, and
//! all nodes may start at the same moment and in any order.
//!
//! - A node that starts again has a higher incarnation; an entry with a lower one than was seen is ignored, however it
//!   got into the list.
//! - With static peers nobody fails over: partitions stay with the nodes of the configuration, and those of a node that is
//!   away wait for it ([`Placing::Configured`]). With etcd they belong to who is alive ([`Placing::Alive`]).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ringline_schema::ids::Partition;

use crate::link::hello::Incarnation;
use crate::placement::NODES_MAX;
use crate::rendezvous::{self, Candidate};

/// Names whose newest incarnation is remembered; above it those that are not on the list are forgotten.
const NEWEST_MAX: usize = 16 * NODES_MAX;

/// What a node does for the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Up,
    /// Leaves in order: takes no new clients and gives its partitions away.
    Draining,
    /// Configured, and not seen alive.
    Away,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// 0 until it was seen alive.
    pub incarnation: Incarnation,
    /// Where other nodes connect to.
    pub peer_address: SocketAddr,
    /// Where clients connect to.
    pub client_address: String,
    /// Its part of the partitions; 0 makes it a gateway.
    pub weight: u32,
    /// Its part of the clients, for the strategies of ROUTE.
    pub client_weight: u32,
    /// Clients that it last reported.
    pub connections: u64,
    pub standing: Standing,
}

/// Whose partitions are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// Everybody on the list owns, alive or not.
    Configured,
    /// Who is up owns.
    Alive,
}

/// What a new list changed, for the log and for what has to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Joined(String),
    /// Not on the list any more, or away.
    Left(String),
    /// Another process under the same name.
    Restarted(String),
    /// The same process at another address.
    Moved(String),
    Draining(String),
}

/// A list that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    #[error("{0} nodes on the list, where {NODES_MAX} are the most")]
    TooMany(usize),
    /// This process has been replaced and must stop: two that believe to be the same node would both write.
    #[error("another process runs as node {name:?}: it started later (incarnation {theirs}, this one is {ours})")]
    Replaced { name: String, ours: u64, theirs: u64 },
}

/// The members as this node knows them, itself among them.
#[derive(Debug)]
pub struct Membership {
    own: String,
    incarnation: Incarnation,
    placing: Placing,
    members: BTreeMap<String, Member>,
    /// The newest incarnation ever seen of each name, also of those that left.
    newest: BTreeMap<String, Incarnation>,
    owners: Vec<Option<String>>,
}

/// Links of one core of this node: those to open and those to close.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub open: Vec<(String, SocketAddr)>,
    pub close: Vec<String>,
}

impl Membership {
    pub fn new(own: &str, incarnation: Incarnation, placing: Placing) -> Self {
        let own = own.to_owned();
        let (members, newest) = (BTreeMap::new(), BTreeMap::new());
        Self { own, incarnation, placing, members, newest, owners: Vec::new() }
    }

    /// Takes the whole list as it is now. Errors: [`ListError`]; what was known stays.
    pub fn update(&mut self, list: BTreeMap<String, Member>) -> Result<Vec<Change>, ListError> {
        if list.len() > NODES_MAX {
            return Err(ListError::TooMany(list.len()));
        }
        if let Some(theirs) = list.get(&self.own).map(|own| own.incarnation).filter(|theirs| *theirs > self.incarnation)
        {
            let (name, ours) = (self.own.clone(), self.incarnation.0);
            return Err(ListError::Replaced { name, ours, theirs: theirs.0 });
        }
        let before = std::mem::take(&mut self.members);
        for (name, mut member) in list {
            let newest = self.newest.entry(name.clone()).or_default();
            if member.incarnation < *newest {
                // A ghost: what is known of the newer process counts, and if nothing is, the node is away.
                match before.get(&name).filter(|known| known.incarnation == *newest) {
                    Some(known) => member = known.clone(),
                    None => member.standing = Standing::Away,
                }
            }
            *newest = member.incarnation.max(*newest);
            self.members.insert(name, member);
        }
        if self.newest.len() > NEWEST_MAX {
            self.newest.retain(|name, _| self.members.contains_key(name));
        }
        self.place();
        Ok(self.changes(&before))
    }

    /// A hello of a node has shown an incarnation, perhaps before any list did.
    pub fn seen(&mut self, name: &str, incarnation: Incarnation) {
        if self.newest.len() <= NEWEST_MAX || self.newest.contains_key(name) {
            let newest = self.newest.entry(name.to_owned()).or_default();
            *newest = incarnation.max(*newest);
        }
    }

    /// The newest incarnation of a node, for judging its hello.
    pub fn newest(&self, name: &str) -> Option<Incarnation> {
        self.newest.get(name).copied().filter(|newest| *newest != Incarnation(0))
    }

    /// The node that owns a partition; `None` when nobody may.
    pub fn owner(&self, partition: Partition) -> Option<&str> {
        self.owners.get(usize::from(partition.number()))?.as_deref()
    }

    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.get(name)
    }

    /// Compares the links that one core has, by name and address, with those it should have: one to every other node
    /// that is on the list, also to those away, which may come back before any list says so.
    pub fn plan(&self, links: &BTreeMap<String, SocketAddr>) -> Plan {
        let wanted = self.members.iter().filter(|(name, _)| **name != self.own);
        let open = wanted.filter(|(name, member)| links.get(*name) != Some(&member.peer_address));
        let gone = |name: &str, at: &SocketAddr| {
            name == self.own || self.members.get(name).is_none_or(|member| member.peer_address != *at)
        };
        Plan {
            open: open.map(|(name, member)| (name.clone(), member.peer_address)).collect(),
            close: links.iter().filter(|(name, at)| gone(name, at)).map(|(name, _)| name.clone()).collect(),
        }
    }

    fn place(&mut self) {
        let placing = self.placing;
        let owns = |member: &Member| match (placing, member.standing) {
            (Placing::Configured, Standing::Up | Standing::Away | Standing::Draining) => true,
            (Placing::Alive, standing) => standing == Standing::Up,
        };
        let members = self.members.iter().filter(|(_, member)| owns(member));
        let candidates: Vec<_> = members.map(|(name, member)| Candidate { name, weight: member.weight }).collect();
        let name = |at: usize| candidates.get(at).map(|candidate| candidate.name.to_owned());
        self.owners = rendezvous::owners(&candidates).into_iter().map(|owner| owner.and_then(name)).collect();
    }

    fn changes(&self, before: &BTreeMap<String, Member>) -> Vec<Change> {
        let is_there = |member: &&Member| member.standing != Standing::Away;
        let mut changes = Vec::new();
        for name in before.keys().filter(|name| !self.members.contains_key(*name)) {
            changes.extend(before.get(name).filter(is_there).map(|_| Change::Left(name.clone())));
        }
        for (name, now) in &self.members {
            let change = match (before.get(name).filter(is_there), Some(now).filter(is_there)) {
                (None, None) => None,
                (None, Some(_)) => Some(Change::Joined(name.clone())),
                (Some(_), None) => Some(Change::Left(name.clone())),
                (Some(was), Some(now)) if was.incarnation != now.incarnation => Some(Change::Restarted(name.clone())),
                (Some(was), Some(now)) if was.peer_address != now.peer_address => Some(Change::Moved(name.clone())),
                (Some(was), Some(now)) if was.standing != now.standing && now.standing == Standing::Draining => {
                    Some(Change::Draining(name.clone()))
                }
                (Some(_), Some(_)) => None,
            };
            changes.extend(change);
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::ids::PARTITIONS;

    fn member(at: u16, incarnation: u64) -> Member {
        Member {
            incarnation: Incarnation(incarnation),
            peer_address: SocketAddr::from(([127, 0, 0, 1], 9_000 + at)),
            client_address: format!("127.0.0.1:{}", 9_700 + at),
            weight: 1,
            client_weight: 1,
            connections: 0,
            standing: Standing::Up,
        }
    }

    fn list(nodes: &[(u16, u64)]) -> BTreeMap<String, Member> {
        nodes.iter().map(|&(at, incarnation)| (format!("n{at}"), member(at, incarnation))).collect()
    }

    fn owned(membership: &Membership, name: &str) -> usize {
        let partitions = (0..PARTITIONS).filter_map(Partition::new);
        partitions.filter(|partition| membership.owner(*partition) == Some(name)).count()
    }

    #[test]
    fn a_list_that_comes_twice_changes_nothing_and_one_that_was_missed_does_no_harm() {
        let mut membership = Membership::new("n1", Incarnation(5), Placing::Alive);
        let joined = |names: &[&str]| names.iter().map(|name| Change::Joined((*name).into())).collect::<Vec<_>>();
        assert_eq!(membership.update(list(&[(1, 5), (2, 6), (3, 7)])).unwrap(), joined(&["n1", "n2", "n3"]));
        assert_eq!(membership.update(list(&[(1, 5), (2, 6), (3, 7)])).unwrap(), []);
        // n3 left and n4 came between two looks.
        let changes = membership.update(list(&[(1, 5), (2, 6), (4, 7)])).unwrap();
        assert_eq!(changes, [Change::Left("n3".into()), Change::Joined("n4".into())]);
        assert_eq!(owned(&membership, "n3"), 0);
        assert_eq!(["n1", "n2", "n4"].map(|name| owned(&membership, name)).iter().sum::<usize>(), 1_024);
        let mut moved = list(&[(1, 5), (2, 6), (4, 8)]);
        moved.get_mut("n2").unwrap().peer_address.set_port(1);
        let changes = membership.update(moved).unwrap();
        assert_eq!(changes, [Change::Moved("n2".into()), Change::Restarted("n4".into())]);
    }

    #[test]
    fn an_old_incarnation_is_not_believed() {
        let mut membership = Membership::new("n1", Incarnation(5), Placing::Alive);
        membership.update(list(&[(1, 5), (2, 9)])).unwrap();
        assert_eq!(membership.update(list(&[(1, 5), (2, 8)])).unwrap(), [], "the newer process is known");
        assert_eq!(membership.member("n2").unwrap().incarnation, Incarnation(9));
        // A hello was faster than the list: what the list says is of the process before.
        membership.seen("n2", Incarnation(12));
        assert_eq!(membership.newest("n2"), Some(Incarnation(12)));
        assert_eq!(membership.update(list(&[(1, 5), (2, 9)])).unwrap(), [Change::Left("n2".into())]);
        assert_eq!(membership.update(list(&[(1, 5), (2, 12)])).unwrap(), [Change::Joined("n2".into())]);
        assert_eq!(membership.newest("n9"), None);
    }

    #[test]
    fn who_has_been_replaced_must_stop_and_lists_are_bounded() {
        let mut membership = Membership::new("n1", Incarnation(5), Placing::Alive);
        membership.update(list(&[(1, 5), (2, 6)])).unwrap();
        let error = membership.update(list(&[(1, 6), (2, 6)])).unwrap_err();
        assert_eq!(error, ListError::Replaced { name: "n1".into(), ours: 5, theirs: 6 });
        let many: Vec<_> = (0..=NODES_MAX as u16).map(|at| (at, 1)).collect();
        assert_eq!(membership.update(list(&many)), Err(ListError::TooMany(NODES_MAX + 1)));
        assert!(membership.member("n2").is_some_and(|member| member.standing == Standing::Up), "what was known stays");
    }

    #[test]
    fn configured_nodes_keep_their_partitions_while_they_are_away() {
        let of = |placing| {
            let mut membership = Membership::new("n1", Incarnation(5), placing);
            let mut nodes = list(&[(1, 5), (2, 0), (3, 7), (4, 8)]);
            nodes.get_mut("n2").unwrap().standing = Standing::Away;
            nodes.get_mut("n3").unwrap().standing = Standing::Draining;
            nodes.get_mut("n4").unwrap().weight = 0;
            membership.update(nodes).unwrap();
            ["n1", "n2", "n3", "n4"].map(|name| owned(&membership, name) > 0)
        };
        assert_eq!(of(Placing::Configured), [true, true, true, false]);
        assert_eq!(of(Placing::Alive), [true, false, false, false]);
    }

    #[test]
    fn links_follow_the_list() {
        let mut membership = Membership::new("n1", Incarnation(5), Placing::Configured);
        membership.update(list(&[(1, 5), (2, 6), (3, 0)])).unwrap();
        let address = |at: u16| SocketAddr::from(([127, 0, 0, 1], 9_000 + at));
        let plan = membership.plan(&BTreeMap::new());
        assert_eq!(plan.open, [("n2".to_owned(), address(2)), ("n3".to_owned(), address(3))]);
        let links = BTreeMap::from([("n2".into(), address(2)), ("n3".into(), address(9)), ("n7".into(), address(7))]);
        let plan = membership.plan(&links);
        assert_eq!(plan.open, [("n3".to_owned(), address(3))], "at its new address");
        assert_eq!(plan.close, ["n3", "n7"]);
        let links = BTreeMap::from([("n2".into(), address(2)), ("n3".into(), address(3))]);
        assert_eq!(membership.plan(&links), Plan::default());
    }
}
