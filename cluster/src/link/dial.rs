//! When to try a peer again: exponential back-off with jitter, and back to the shortest wait after a connection that lasted.
//!
//! All nodes of a cluster start at the same moment and lose the same peer at the same moment: the jitter keeps them
//! from dialling it in step.

/// The first wait.
pub const WAIT_MIN_MS: u64 = 50;
/// The longest.
pub const WAIT_MAX_MS: u64 = 5_000;
/// A connection that held this long counts as a success; a shorter one does not shorten the waits.
pub const STEADY_MS: u64 = 10_000;

/// The waits of one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
    up_since_ms: Option<u64>,
}

impl Backoff {
    /// A connection stands.
    pub fn connected(&mut self, now_ms: u64) {
        self.up_since_ms = Some(now_ms);
    }

    /// A connection ended, or none came about: how long to wait before the next try, in milliseconds. `draw` is random
    /// in its whole range; the wait lies between half of the full one and the full one.
    pub fn wait_ms(&mut self, now_ms: u64, draw: u64) -> u64 {
        let steady = |since: u64| now_ms.saturating_sub(since) >= STEADY_MS;
        if self.up_since_ms.take().is_some_and(steady) {
            self.failures = 0;
        }
        let full = WAIT_MIN_MS.saturating_mul(1 << self.failures.min(20)).min(WAIT_MAX_MS);
        self.failures = self.failures.saturating_add(1);
        let half = full / 2;
        half + ((u128::from(draw) * u128::from(full - half + 1)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_after_a_steady_connection() {
        let mut backoff = Backoff::default();
        let longest: Vec<u64> = (0..9).map(|_| backoff.wait_ms(0, u64::MAX)).collect();
        assert_eq!(longest, [50, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        let shortest = backoff.wait_ms(0, 0);
        assert_eq!(shortest, 2_500);
        // One that breaks at once does not count.
        backoff.connected(100);
        assert_eq!(backoff.wait_ms(100 + STEADY_MS - 1, u64::MAX), WAIT_MAX_MS);
        backoff.connected(100);
        assert_eq!(backoff.wait_ms(100 + STEADY_MS, u64::MAX), WAIT_MIN_MS);
    }
}
