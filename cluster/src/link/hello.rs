//! The first frame of a connection: who speaks, and whether the two may work together.
//!
//! The node's name is also in its certificate; whoever owns the connection passes the certified one, and a hello that says
//! otherwise is refused. What is judged here is judged on both sides, so both give the same reason.

use std::cmp::Ordering;
use std::ops::RangeInclusive;

use ringline_schema::ids::PARTITIONS;
use ringline_schema::pack::{BadPack, Reader, Writer};

/// The versions of what nodes say to each other that this build speaks.
pub const PROTOCOL: RangeInclusive<u16> = 1..=1;
/// The longest name of a cluster or a node.
pub const NAME_BYTES_MAX: usize = 64;

/// One process of a node. A node that starts again has a higher one: the time of its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// What a node says of itself at the beginning of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub cluster: String,
    pub node: String,
    pub incarnation: Incarnation,
    /// The fingerprint of its list of nodes: with other names or weights in it two nodes would own the same.
    pub list: u64,
    /// Lowest and highest version it speaks.
    pub protocol: (u16, u16),
    /// How many cores it has, and which of them speaks here: a node with another number places partitions otherwise.
    pub cores: u16,
    pub core: u16,
    /// The incarnation of the other side that it has spoken with before, if any, and the last batch it has from that.
    pub knows: Option<(Incarnation, u64)>,
}

/// Why two nodes do not work together. Each is counted by name; a refused peer is tried again with back-off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the peer belongs to cluster {theirs:?}, this node to {ours:?}")]
    OtherCluster { ours: String, theirs: String },
    #[error("{0:?} has another list of nodes, by names or weights: it has to be the same on all nodes")]
    OtherList(String),
    #[error("the peer calls itself {said:?}, its certificate says {certified:?}")]
    OtherName { said: String, certified: String },
    #[error("the peer has this node's own name, {0:?}: names are unique in a cluster")]
    OwnName(String),
    #[error("the peer speaks versions {theirs:?} of the protocol, this node {ours:?}")]
    Protocol { ours: (u16, u16), theirs: (u16, u16) },
    #[error("{node:?} has started again since: this is incarnation {said}, the newest known is {newest}")]
    OldIncarnation { node: String, said: u64, newest: u64 },
    #[error("core {core} of {cores}")]
    Core { core: u16, cores: u16 },
}

/// What two hellos agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The highest version that both speak.
    pub protocol: u16,
    /// The last batch that the peer has from this process; 0 when it has not heard of it.
    pub peer_has: u64,
    /// The peer is a process that this node has not spoken with before.
    pub peer_is_new: bool,
}

impl Hello {
    pub(super) fn encode(&self, out: &mut Writer) {
        out.text(&self.cluster);
        out.text(&self.node);
        out.number(self.incarnation.0);
        out.number(self.list);
        out.number(self.protocol.0.into());
        out.number(self.protocol.1.into());
        out.number(self.cores.into());
        out.number(self.core.into());
        // 0 is no incarnation, so it can stand for none.
        let (incarnation, number) = self.knows.unwrap_or_default();
        out.number(incarnation.0);
        out.number(number);
    }

    pub(super) fn decode(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        let hello = Self {
            cluster: name(from)?,
            node: name(from)?,
            incarnation: Incarnation(from.number()?),
            list: from.number()?,
            protocol: (small(from)?, small(from)?),
            cores: small(from)?,
            core: small(from)?,
            knows: Some((Incarnation(from.number()?), from.number()?)).filter(|(known, _)| *known != Incarnation(0)),
        };
        if hello.incarnation == Incarnation(0) {
            return Err(BadPack("incarnation"));
        }
        Ok(hello)
    }

    /// Judges the hello of the other side, whose certificate says `certified`. `newest`: the newest incarnation of that
    /// node that this one has heard of, from whatever source.
    pub fn judge(&self, theirs: &Self, certified: &str, newest: Option<Incarnation>) -> Result<Agreed, Refusal> {
        if theirs.cluster != self.cluster {
            return Err(Refusal::OtherCluster { ours: self.cluster.clone(), theirs: theirs.cluster.clone() });
        }
        if theirs.node != certified {
            return Err(Refusal::OtherName { said: theirs.node.clone(), certified: certified.to_owned() });
        }
        if theirs.node == self.node {
            return Err(Refusal::OwnName(self.node.clone()));
        }
        if theirs.list != self.list {
            return Err(Refusal::OtherList(theirs.node.clone()));
        }
        let newest = newest.unwrap_or_default();
        if theirs.incarnation < newest {
            let (node, said) = (theirs.node.clone(), theirs.incarnation.0);
            return Err(Refusal::OldIncarnation { node, said, newest: newest.0 });
        }
        if theirs.core >= theirs.cores || theirs.cores > PARTITIONS {
            return Err(Refusal::Core { core: theirs.core, cores: theirs.cores });
        }
        let (low, high) = (self.protocol.0.max(theirs.protocol.0), self.protocol.1.min(theirs.protocol.1));
        if low > high {
            return Err(Refusal::Protocol { ours: self.protocol, theirs: theirs.protocol });
        }
        let peer_has = theirs.knows.filter(|(known, _)| *known == self.incarnation).map_or(0, |(_, number)| number);
        let peer_is_new = self.knows.is_none_or(|(known, _)| known != theirs.incarnation);
        Ok(Agreed { protocol: high, peer_has, peer_is_new })
    }
}

/// Of two connections between the same two cores, whether the one dialled by `dialler` stays: the node with the lower
/// name dials for both. Both sides find the same.
pub fn is_dialled_by_the_right_one(dialler: &str, listener: &str) -> bool {
    dialler.cmp(listener) == Ordering::Less
}

fn name(from: &mut Reader<'_>) -> Result<String, BadPack> {
    let name = from.text()?;
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(BadPack("name"));
    }
    Ok(name.to_owned())
}

fn small(from: &mut Reader<'_>) -> Result<u16, BadPack> {
    u16::try_from(from.number()?).map_err(|_| BadPack("small number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(node: &str) -> Hello {
        let knows = Some((Incarnation(7), 12));
        Hello {
            cluster: "c".into(),
            node: node.into(),
            incarnation: Incarnation(5),
            list: 9,
            protocol: (1, 3),
            cores: 2,
            core: 1,
            knows,
        }
    }

    #[test]
    fn two_that_fit_agree() {
        let (ours, theirs) = (hello("a"), Hello { incarnation: Incarnation(7), protocol: (2, 9), ..hello("b") });
        let agreed = ours.judge(&theirs, "b", Some(Incarnation(7)));
        assert_eq!(
            agreed,
            Ok(Agreed { protocol: 3, peer_has: 0, peer_is_new: false }),
            "it knows another process of ours"
        );
        let theirs = Hello { knows: Some((Incarnation(5), 44)), incarnation: Incarnation(8), ..theirs };
        assert_eq!(ours.judge(&theirs, "b", None), Ok(Agreed { protocol: 3, peer_has: 44, peer_is_new: true }));
    }

    #[test]
    fn each_reason_has_its_refusal() {
        let (ours, good) = (hello("a"), hello("b"));
        let refused = |theirs: &Hello, certified: &str, newest: u64| {
            ours.judge(theirs, certified, Some(Incarnation(newest))).unwrap_err()
        };
        let other = Hello { cluster: "d".into(), ..good.clone() };
        assert!(matches!(refused(&other, "b", 0), Refusal::OtherCluster { .. }));
        assert!(matches!(refused(&Hello { list: 8, ..good.clone() }, "b", 0), Refusal::OtherList(_)));
        assert!(matches!(refused(&good, "c", 0), Refusal::OtherName { .. }));
        assert!(matches!(refused(&hello("a"), "a", 0), Refusal::OwnName(_)));
        assert!(matches!(refused(&good, "b", 6), Refusal::OldIncarnation { said: 5, newest: 6, .. }));
        assert!(matches!(refused(&Hello { core: 2, ..good.clone() }, "b", 0), Refusal::Core { .. }));
        assert!(matches!(refused(&Hello { cores: PARTITIONS + 1, ..good.clone() }, "b", 0), Refusal::Core { .. }));
        for protocol in [(4, 9), (0, 0), (3, 1)] {
            let theirs = Hello { protocol, ..good.clone() };
            assert!(matches!(refused(&theirs, "b", 0), Refusal::Protocol { .. }), "{protocol:?}");
        }
    }

    #[test]
    fn both_sides_keep_the_same_connection() {
        for (one, other) in [("a", "b"), ("n10", "n9")] {
            assert_ne!(is_dialled_by_the_right_one(one, other), is_dialled_by_the_right_one(other, one));
        }
    }
}
