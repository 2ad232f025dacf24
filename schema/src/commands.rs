//! The one table of commands. Parser, size limits, metrics and documentation derive from it.

use crate::limits;

/// Who sends a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Client to server; answered by request id (but ACK, which is answered only when refused).
    Request,
    /// Server to client, carrying the request id of what it answers.
    Answer,
    /// Server to client, request id 0.
    Push,
}

macro_rules! commands {
    ($($number:literal $variant:ident $name:literal $direction:ident body=$body:literal max=$max:expr, before_login=$before:literal;)*) => {
        /// Command numbers of the wire. Numbers are never reused; 0x8000 and above belong to applications.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Command {
            $(#[doc = concat!($name, ", body table `", $body, "`")] $variant = $number,)*
        }

        impl Command {
            /// Every command, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// `None` for a number that this version does not know.
            pub fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            pub fn direction(self) -> Direction {
                match self { $(Self::$variant => Direction::$direction,)* }
            }

            /// The FlatBuffers table of the body.
            pub fn table(self) -> &'static str {
                match self { $(Self::$variant => $body,)* }
            }

            /// Largest body in bytes, whatever the frame limit allows.
            pub fn body_bytes_max(self) -> u32 {
                match self { $(Self::$variant => $max,)* }
            }

            /// Whether the server serves it on a connection that has not logged in.
            pub fn before_login(self) -> bool {
                match self { $(Self::$variant => $before,)* }
            }
        }
    };
}

/// Bodies of a few numbers and names.
const SMALL: u32 = 1024;
/// Bodies that authenticate: a name and a password or token.
const CREDENTIAL: u32 = 4 * 1024 - limits::FRAME_HEADER_BYTES as u32;
/// Bodies that carry messages: only the frame limit applies.
const LARGE: u32 = limits::FRAME_BYTES_CEILING;

commands! {
    0x0101 Register        "REGISTER"         Request body="Register"        max=CREDENTIAL, before_login=true;
    0x0102 Login           "LOGIN"            Request body="Login"           max=CREDENTIAL, before_login=true;
    0x0103 Logout          "LOGOUT"           Request body="Logout"          max=SMALL, before_login=false;
    0x0104 Ping            "PING"             Request body="Ping"            max=SMALL, before_login=true;
    0x0105 Route           "ROUTE"            Request body="Route"           max=SMALL, before_login=true;
    0x0106 Send            "SEND"             Request body="Send"            max=LARGE, before_login=false;
    0x0107 Ack             "ACK"              Request body="Ack"             max=SMALL, before_login=false;
    0x0108 Fetch           "FETCH"            Request body="Fetch"           max=SMALL, before_login=false;
    0x0109 Online          "ONLINE"           Request body="Online"          max=SMALL, before_login=false;
    0x010a Conversations   "CONVERSATIONS"    Request body="Conversations"   max=SMALL, before_login=false;

    0x0200 Failure         "FAILURE"          Answer  body="Failure"         max=SMALL, before_login=true;
    0x0201 RegisterOk      "REGISTER_OK"      Answer  body="RegisterOk"      max=SMALL, before_login=true;
    0x0202 LoginOk         "LOGIN_OK"         Answer  body="LoginOk"         max=SMALL, before_login=true;
    0x0203 LogoutOk        "LOGOUT_OK"        Answer  body="LogoutOk"        max=SMALL, before_login=false;
    0x0204 Pong            "PONG"             Answer  body="Pong"            max=SMALL, before_login=true;
    0x0205 RouteOk         "ROUTE_OK"         Answer  body="RouteOk"         max=SMALL, before_login=true;
    0x0206 SendAck         "SEND_ACK"         Answer  body="SendAck"         max=SMALL, before_login=false;
    0x0208 FetchOk         "FETCH_OK"         Answer  body="FetchOk"         max=LARGE, before_login=false;
    0x0209 OnlineOk        "ONLINE_OK"        Answer  body="OnlineOk"        max=LARGE, before_login=false;
    0x020a ConversationsOk "CONVERSATIONS_OK" Answer  body="ConversationsOk" max=LARGE, before_login=false;

    0x0301 Deliver         "DELIVER"          Push    body="Message"         max=LARGE, before_login=false;
    0x0302 Receipt         "RECEIPT"          Push    body="Receipt"         max=SMALL, before_login=false;
    0x0303 Lagged          "LAGGED"           Push    body="Lagged"          max=SMALL, before_login=false;
    0x0304 Kicked          "KICKED"           Push    body="Kicked"          max=SMALL, before_login=false;
    0x0305 Goaway          "GOAWAY"           Push    body="Goaway"          max=SMALL, before_login=false;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_and_names_are_unique_and_below_the_application_range() {
        let mut names = HashSet::new();
        for &command in Command::ALL {
            assert_eq!(Command::from_number(command as u16), Some(command));
            assert!((command as u16) < 0x8000);
            assert!(names.insert(command.name()));
        }
    }

    #[test]
    fn only_four_requests_are_served_before_login() {
        let early: Vec<_> = Command::ALL
            .iter()
            .filter(|command| command.direction() == Direction::Request && command.before_login())
            .map(|command| command.name())
            .collect();
        assert_eq!(early, ["REGISTER", "LOGIN", "PING", "ROUTE"]);
    }
}
