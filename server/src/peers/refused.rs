//! Why connections at the peer port, or to a peer, came to nothing: one table, counted by name and logged now and then.
//! Owned by a core.

use ringline_cluster::link::channel::Violation;
use ringline_cluster::link::frame::FrameError;
use ringline_cluster::link::hello::Refusal;
use rustls::{CertificateError, Error};

/// A reason that repeats is logged at most this often.
const LOG_INTERVAL_MS: u64 = 60_000;

macro_rules! reasons {
    ($($variant:ident $name:literal $text:literal;)*) => {
        /// See the module.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $(#[doc = $text] $variant,)*
        }

        impl Reason {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// For metrics and logs.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    NotTls "not_tls" "What came is no TLS.";
    Tls "tls" "TLS failed otherwise.";
    NoCertificate "no_certificate" "The peer showed none.";
    WrongCa "wrong_ca" "Its certificate is not signed by the cluster's CA.";
    BadCertificate "bad_certificate" "Its certificate has expired, is not valid yet or can't be read.";
    RefusedThere "refused_there" "The other side refused this node's certificate.";
    OtherName "other_name" "It calls itself otherwise than its certificate, or is another node than the one dialled.";
    OwnName "own_name" "It has this node's own name.";
    UnknownNode "unknown_node" "It is not on the list of nodes.";
    OtherCluster "other_cluster" "It belongs to another cluster.";
    OtherList "other_list" "Its list of nodes has other names or weights.";
    Protocol "protocol" "No version of the protocol is common to both.";
    OldIncarnation "old_incarnation" "A newer process of that node is known.";
    Core "core" "It speaks for a core that it does not have.";
    Huge "huge_frame" "A frame larger than any may be.";
    Garbage "bad_frame" "A frame that can't be read.";
    Violation "violation" "It broke a rule of the link.";
    Late "timeout" "It did not say who it is in time.";
    TooMany "too_many" "Too many connections wait for their hello.";
}

impl From<&Error> for Reason {
    fn from(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                Self::WrongCa
            }
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => Self::OtherName,
            Error::InvalidCertificate(_) => Self::BadCertificate,
            Error::AlertReceived(_) => Self::RefusedThere,
            Error::InvalidMessage(_)
            | Error::InappropriateMessage { .. }
            | Error::InappropriateHandshakeMessage { .. }
            | Error::DecryptError
            | Error::PeerSentOversizedRecord => Self::NotTls,
            _ => Self::Tls,
        }
    }
}

impl From<&Refusal> for Reason {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::OtherCluster { .. } => Self::OtherCluster,
            Refusal::OtherList(_) => Self::OtherList,
            Refusal::OtherName { .. } => Self::OtherName,
            Refusal::OwnName(_) => Self::OwnName,
            Refusal::Protocol { .. } => Self::Protocol,
            Refusal::OldIncarnation { .. } => Self::OldIncarnation,
            Refusal::Core { .. } => Self::Core,
        }
    }
}

impl From<&FrameError> for Reason {
    fn from(error: &FrameError) -> Self {
        match error {
            FrameError::TooLarge { .. } => Self::Huge,
            FrameError::Kind(_) | FrameError::NoHello | FrameError::Body(_) => Self::Garbage,
        }
    }
}

impl From<&Violation> for Reason {
    fn from(_: &Violation) -> Self {
        Self::Violation
    }
}

/// How often each reason was met.
pub type RefusedCounts = [u64; Reason::ALL.len()];

/// Counts and logs.
#[derive(Debug, Default)]
pub struct Refused {
    counts: RefusedCounts,
    logged_ms: [Option<u64>; Reason::ALL.len()],
}

impl Refused {
    /// Counts, and logs unless the same was logged lately. `who` and `why` are for people.
    pub fn note(&mut self, reason: Reason, now_ms: u64, (who, why): (&str, &dyn std::fmt::Display)) {
        let at = reason as usize;
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        let Some(logged_ms) = self.logged_ms.get_mut(at) else { return };
        if logged_ms.is_none_or(|logged_ms| now_ms.saturating_sub(logged_ms) >= LOG_INTERVAL_MS) {
            *logged_ms = Some(now_ms);
            let reason = reason.name();
            tracing::warn!(reason, "refused a connection with {who}: {why} (the same reason is logged once a minute)");
        }
    }

    pub fn counts(&self) -> RefusedCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_names_of_their_own_and_are_counted() {
        let mut refused = Refused::default();
        for (at, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, at);
            assert!(Reason::ALL.iter().skip(at + 1).all(|other| other.name() != reason.name()));
            refused.note(*reason, 0, ("a test", &"tried"));
            refused.note(*reason, 1, ("a test", &"tried"));
        }
        assert!(refused.counts().iter().all(|count| *count == 2));
    }
}
