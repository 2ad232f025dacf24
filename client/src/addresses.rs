//! Where a client connects next: the addresses it was given, and the one it was sent to.
//!
//! Pure; owned by the client's one task. In a cluster a user lives on one node. Which one, any of them tells (ROUTE), and
//! whoever is asked to log somebody else's user in, answers with the address of that one (REDIRECT). A client stays with
//! it as long as it can be reached, and else begins anew with those it was given. Invariant: a client is sent on at most
//! [`HOPS_MAX`] times before it waits as after any other failure, so nodes that disagree about a user can't keep it running
//! in circles.

/// Routes and redirections in a row that are followed at once.
const HOPS_MAX: u8 = 3;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    configured: Vec<String>,
    at: usize,
    /// Where the last REDIRECT pointed.
    sent_to: Option<String>,
    hops: u8,
    /// Of those that were given, how many were passed over in this attempt.
    passed: usize,
}

impl Addresses {
    /// `list`: `host:port`, several with commas between them. `draw` is random in its whole range: of several any is the
    /// first, or all clients would begin at the same one.
    pub(crate) fn new(list: &str, draw: usize) -> Self {
        let configured: Vec<_> = list.split(',').map(|address| address.trim().to_owned()).collect();
        let at = draw.checked_rem(configured.len()).unwrap_or(0);
        Self { configured, at, sent_to: None, hops: 0, passed: 0 }
    }

    /// Whether the next address is one of several that were given, so that another may be the right one: it is asked for the
    /// route before it is told a password.
    pub(crate) fn is_a_guess(&self) -> bool {
        self.sent_to.is_none() && self.configured.len() > 1
    }

    /// The server says where this user is served from now on.
    pub(crate) fn send_to(&mut self, address: &str) {
        self.sent_to = Some(address.to_owned());
    }

    pub(crate) fn next(&self) -> String {
        self.sent_to.clone().or_else(|| self.configured.get(self.at).cloned()).unwrap_or_default()
    }

    /// A REDIRECT came, or a route that leads elsewhere. False: too many in a row.
    pub(crate) fn redirect(&mut self, address: &str) -> bool {
        self.hops = self.hops.saturating_add(1);
        let follows = self.hops <= HOPS_MAX;
        self.sent_to = follows.then(|| address.to_owned());
        follows
    }

    /// One of those that were given can't be reached: whether another is to be tried at once. Each is, once in an attempt.
    pub(crate) fn pass_over(&mut self) -> bool {
        let passes = self.is_a_guess() && self.passed + 1 < self.configured.len();
        if passes {
            self.passed += 1;
            self.turn();
        }
        passes
    }

    fn turn(&mut self) {
        self.at = (self.at + 1).checked_rem(self.configured.len()).unwrap_or(0);
    }

    /// A login succeeded.
    pub(crate) fn reached(&mut self) {
        (self.hops, self.passed) = (0, 0);
    }

    /// No login there: the next of those that were given is tried.
    pub(crate) fn failed(&mut self) {
        (self.hops, self.passed) = (0, 0);
        if self.sent_to.take().is_none() {
            self.turn();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_cannot_be_reached_are_passed_over_once_each() {
        let mut addresses = Addresses::new("a:1,b:2,c:3", 1);
        assert!(addresses.pass_over());
        assert_eq!(addresses.next(), "c:3");
        assert!(addresses.pass_over() && !addresses.pass_over());
        assert_eq!(addresses.next(), "a:1");
        addresses.failed();
        assert_eq!(addresses.next(), "b:2");
        assert!(addresses.redirect("d:4") && !addresses.pass_over(), "only those that were given");
        addresses.reached();
        addresses.failed();
        assert!(addresses.pass_over());
        assert!(!Addresses::new("a:1", 0).pass_over(), "there is no other");
    }

    #[test]
    fn given_addresses_are_tried_in_turn() {
        let mut addresses = Addresses::new("a:1, b:2", 2);
        assert_eq!(addresses.next(), "a:1");
        addresses.failed();
        assert_eq!(addresses.next(), "b:2");
        addresses.failed();
        assert_eq!(addresses.next(), "a:1");
        assert_eq!(Addresses::new("c:3", 9).next(), "c:3");
        assert_eq!(Addresses::new("a:1, b:2", 5).next(), "b:2");
    }

    #[test]
    fn who_is_sent_on_stays_there_until_it_fails_and_does_not_run_in_circles() {
        let mut addresses = Addresses::new("a:1,b:2", 0);
        assert!(addresses.is_a_guess() && !Addresses::new("a:1", 0).is_a_guess());
        assert!(addresses.redirect("c:3"));
        assert!(!addresses.is_a_guess());
        addresses.reached();
        assert_eq!(addresses.next(), "c:3", "also for the next connection");
        addresses.failed();
        assert_eq!(addresses.next(), "a:1", "back to those that were given");
        for _ in 0..HOPS_MAX {
            assert!(addresses.redirect("d:4"));
        }
        assert!(!addresses.redirect("e:5"));
        assert_eq!(addresses.next(), "a:1");
        addresses.failed();
        assert!(addresses.redirect("c:3"), "after a pause it may be sent on again");
        addresses.reached();
        addresses.send_to("f:6");
        assert_eq!(addresses.next(), "f:6", "and when it has gone it comes back there");
    }
}
