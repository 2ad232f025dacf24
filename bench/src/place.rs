//! Where the clients of a run with several targets live, and who is paired with whom by that.
//!
//! Main thread, before the run. The first target is asked by ROUTE for the node of each user, so nothing here knows how a
//! cluster places them; it has to route by `consistent_hash`, or logins end in REDIRECT. Invariants: nodes get equal numbers of
//! clients where pairs are chosen, to within one pair; a user is asked about once.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use clap::ValueEnum;
use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::frame::FrameDecoder;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::{Reply, Request};

use crate::Failure;
use crate::plan::name;

/// Questions under way on the connection: well below what a server reads before a login.
const ASKED_AT_ONCE: usize = 32;
/// Questions of one connection: it has to log in within some seconds, and does not.
const ASKED_MAX: usize = 4_096;
/// Users looked at for each one that is wanted.
const LOOKED_AT_MAX: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the two of a pair live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Pairs {
    /// Wherever they happen to
    #[default]
    Any,
    /// On one node, all nodes in turn
    Within,
    /// On two nodes, all nodes in turn
    Across,
}

/// The users of a run, and for each the number of its target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Homes {
    pub names: Vec<String>,
    pub at: Vec<u16>,
}

/// Finds the users of a run. Errors: a server that does not answer, a node that is no target, a target where no user lives.
pub fn settle(targets: &[SocketAddr], prefix: &str, (clients, pairs): (u32, Pairs)) -> Result<Homes, Failure> {
    let wanted = clients as usize;
    let mut dealer = Dealer::new(targets.len(), pairs);
    let mut asker = None;
    let mut looked_at = 0u32;
    while dealer.homes.names.len() < wanted {
        if looked_at as usize >= wanted.saturating_mul(LOOKED_AT_MAX) {
            let empty: Vec<_> = targets.iter().enumerate().filter(|(at, _)| !dealer.knows(*at)).collect();
            let empty: Vec<_> = empty.into_iter().map(|(_, target)| target.to_string()).collect();
            return Err(Failure::Failed(format!("no users live on {}: leave it out of --target", empty.join(", "))));
        }
        let batch: Vec<_> = (0..ASKED_AT_ONCE as u32).map(|more| name(prefix, looked_at + 1 + more)).collect();
        looked_at += ASKED_AT_ONCE as u32;
        let asker = Asker::fresh(&mut asker, first(targets)?)?;
        for (name, address) in batch.iter().zip(asker.homes(&batch)?) {
            let home =
                address.parse().ok().and_then(|address: SocketAddr| targets.iter().position(|at| *at == address));
            let home = home.ok_or_else(|| {
                Failure::Usage(format!("--target: {name} lives on a node that is not among them, {address}"))
            })?;
            dealer.take(name, home);
        }
    }
    dealer.homes.names.truncate(wanted);
    dealer.homes.at.truncate(wanted);
    Ok(dealer.homes)
}

fn first(targets: &[SocketAddr]) -> Result<SocketAddr, Failure> {
    targets.first().copied().ok_or_else(|| Failure::Usage("--target: none".to_owned()))
}

/// Makes pairs of users as they come.
struct Dealer {
    pairs: Pairs,
    /// By target: those who wait for a partner or for their turn.
    waiting: Vec<Vec<String>>,
    /// By target: whether anybody lives there.
    known: Vec<bool>,
    /// The target whose turn it is.
    turn: usize,
    homes: Homes,
}

impl Dealer {
    fn new(targets: usize, pairs: Pairs) -> Self {
        let (waiting, known) = (vec![Vec::new(); targets], vec![false; targets]);
        Self { pairs, waiting, known, turn: 0, homes: Homes::default() }
    }

    fn knows(&self, target: usize) -> bool {
        self.known.get(target).is_some_and(|known| *known)
    }

    fn take(&mut self, name: &str, home: usize) {
        if let (Some(waiting), Some(known)) = (self.waiting.get_mut(home), self.known.get_mut(home)) {
            *known = true;
            waiting.push(name.to_owned());
        }
        match self.pairs {
            Pairs::Any => drop(self.deal(home)),
            Pairs::Within | Pairs::Across => while self.deal_pair() {},
        }
    }

    /// The pair of the target whose turn it is, if both are there.
    fn deal_pair(&mut self) -> bool {
        let (one, targets) = (self.turn, self.waiting.len().max(1));
        let (other, needed) = match self.pairs {
            Pairs::Within => (one, 2),
            Pairs::Any | Pairs::Across => ((one + 1) % targets, 1),
        };
        let there = |target: usize| self.waiting.get(target).is_some_and(|waiting| waiting.len() >= needed);
        if !there(one) || !there(other) {
            return false;
        }
        self.turn = (one + 1) % targets;
        self.deal(one) && self.deal(other)
    }

    fn deal(&mut self, home: usize) -> bool {
        let Some(name) = self.waiting.get_mut(home).and_then(Vec::pop) else { return false };
        self.homes.names.push(name);
        self.homes.at.push(u16::try_from(home).unwrap_or(u16::MAX));
        true
    }
}

/// A connection that never logs in.
struct Asker {
    stream: TcpStream,
    decoder: FrameDecoder,
    asked: usize,
}

impl Asker {
    /// The one that is there, or another when it has asked enough.
    fn fresh(place: &mut Option<Self>, target: SocketAddr) -> Result<&mut Self, Failure> {
        if place.as_ref().is_some_and(|asker| asker.asked >= ASKED_MAX) {
            *place = None;
        }
        match place {
            Some(asker) => Ok(asker),
            None => Ok(place.insert(Self::connect(target)?)),
        }
    }

    fn connect(target: SocketAddr) -> Result<Self, Failure> {
        let failed = |error| Failure::Failed(format!("cannot ask {target} where users live: {error}"));
        let stream = TcpStream::connect_timeout(&target, PATIENCE).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(Self { stream, decoder: FrameDecoder::new(), asked: 0 })
    }

    /// The client address of each one's node.
    fn homes(&mut self, names: &[String]) -> Result<Vec<String>, Failure> {
        let failed = |error| Failure::Failed(format!("asking where users live: {error}"));
        let (mut encoder, mut out) = (Encoder::new(), Vec::new());
        for (id, user) in (1..).zip(names) {
            encoder.request(Codec::FlatBuffers, id, &Request::Route { user }, &mut out);
        }
        self.stream.write_all(&out).map_err(failed)?;
        self.asked += names.len();
        let (mut homes, mut input) = (Vec::new(), [0; 4_096]);
        while homes.len() < names.len() {
            let count = self.stream.read(&mut input).map_err(failed)?;
            if count == 0 {
                return Err(Failure::Failed("the server closed while it was asked where users live".to_owned()));
            }
            let mut bytes = input.get(..count).unwrap_or_default();
            while let Ok(Some(frame)) = self.decoder.next(&mut bytes, FRAME_BYTES_CEILING) {
                homes.push(match decode_reply(&frame.header, frame.body) {
                    Ok(Reply::RouteOk { address, .. }) => address.to_owned(),
                    Ok(Reply::Failure { code, .. }) => {
                        return Err(Failure::Failed(format!("ROUTE was refused, {code}: is every node up?")));
                    }
                    Ok(other) => {
                        return Err(Failure::Failed(format!("ROUTE was answered by {}", other.command().name())));
                    }
                    Err(code) => return Err(Failure::Failed(format!("the answer to ROUTE can't be read: {code}"))),
                });
            }
        }
        Ok(homes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 100 users, each third lives on target 0, the others on 1 and 2.
    fn dealt(pairs: Pairs) -> Homes {
        let mut dealer = Dealer::new(3, pairs);
        for number in 0..100 {
            dealer.take(&format!("u{number}"), if number % 3 == 0 { 0 } else { 1 + number % 2 });
        }
        dealer.homes
    }

    #[test]
    fn pairs_live_where_they_are_wanted_and_nodes_get_equal_shares() {
        for pairs in [Pairs::Within, Pairs::Across] {
            let homes = dealt(pairs);
            let mut shares = [0; 3];
            for pair in homes.at.chunks(2) {
                let [one, other] = pair else { panic!("half a pair") };
                assert_eq!(one == other, pairs == Pairs::Within, "{pairs:?}");
                shares[usize::from(*one)] += 1;
                shares[usize::from(*other)] += 1;
            }
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 2 && *least >= 30, "{pairs:?} {shares:?}");
        }
        let all = dealt(Pairs::Any);
        assert_eq!(all.names[..3], ["u0", "u1", "u2"]);
        assert_eq!((all.at.len(), &all.at[..4]), (100, &[0, 2, 1, 0][..]));
    }

    #[test]
    fn nobody_answers_and_nobody_lives_there() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = settle(&[nobody, nobody], "u", (2, Pairs::Any)).unwrap_err();
        assert!(error.to_string().contains("where users live"), "{error}");
        let mut dealer = Dealer::new(2, Pairs::Across);
        (0..10).for_each(|number| dealer.take(&format!("u{number}"), 0));
        assert!(dealer.homes.names.is_empty() && dealer.knows(0) && !dealer.knows(1));
    }
}
