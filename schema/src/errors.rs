//! The one table of errors: what a client can be told, whose fault it is, and whether trying again can help.

use std::fmt;

/// Who can mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Client,
    Server,
    Peer,
}

macro_rules! errors {
    ($($number:literal $variant:ident $name:literal $fault:ident retry=$retry:literal closes=$closes:literal $text:literal;)*) => {
        /// Error codes of the wire. Numbers are never reused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum ErrorCode {
            $(#[doc = $text] $variant = $number,)*
        }

        impl ErrorCode {
            /// Every code, in the order of the table.
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

            pub fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)* }
            }

            /// Whether the same request can succeed later without a change.
            pub fn retryable(self) -> bool {
                match self { $(Self::$variant => $retry,)* }
            }

            /// Whether the server ends the connection after saying so.
            pub fn closes(self) -> bool {
                match self { $(Self::$variant => $closes,)* }
            }

            /// One sentence for people.
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

errors! {
    // The frame.
     1 BadMagic       "BAD_MAGIC"        Client retry=false closes=true  "the bytes are not a Ringline frame";
     2 BadVersion     "BAD_VERSION"      Client retry=false closes=true  "this frame version is not spoken here";
     3 BadCodec       "BAD_CODEC"        Client retry=false closes=true  "this codec is not spoken here (0 = FlatBuffers)";
     4 FrameTooLarge  "FRAME_TOO_LARGE"  Client retry=false closes=true  "the frame is larger than this connection may send";
     5 BadFlags       "BAD_FLAGS"        Client retry=false closes=true  "flags are set that this version does not know";
     6 UnknownCommand "UNKNOWN_COMMAND"  Client retry=false closes=false "no such command, or not one that clients send";
     7 BadBody        "BAD_BODY"         Client retry=false closes=true  "the body does not decode as this command's table";
     8 BufferFull     "BUFFER_FULL"      Client retry=false closes=true  "too many bytes were sent before login";
    // The session.
    20 NotLoggedIn    "NOT_LOGGED_IN"    Client retry=false closes=true  "this command needs a login first";
    21 AlreadyLoggedIn "ALREADY_LOGGED_IN" Client retry=false closes=false "this connection is logged in already";
    22 BadName        "BAD_NAME"         Client retry=false closes=false "a user name is 1 to 64 bytes of UTF-8 without control characters or outer white space";
    23 BadPassword    "BAD_PASSWORD"     Client retry=false closes=false "a password is 6 to 256 bytes";
    24 NameTaken      "NAME_TAKEN"       Client retry=false closes=false "this name is registered already";
    25 AuthFailed     "AUTH_FAILED"      Client retry=false closes=false "name, password or token is wrong";
    26 BadDevice      "BAD_DEVICE"       Client retry=false closes=false "the device id must not be 0 and the kind must be known";
    27 LoginTimeout   "LOGIN_TIMEOUT"    Client retry=true  closes=true  "no login within the time allowed";
    28 IdleTimeout    "IDLE_TIMEOUT"     Client retry=true  closes=true  "nothing was heard for too long";
    29 SlowReader     "SLOW_READER"      Client retry=true  closes=true  "the client did not read what was sent to it";
    30 TooManyLogins  "TOO_MANY_LOGINS"  Client retry=true  closes=true  "too many failed logins on one connection";
    31 LoginInProgress "LOGIN_IN_PROGRESS" Client retry=true closes=false "an earlier REGISTER or LOGIN of this connection is still being answered";
    // The message.
    40 NoSuchUser     "NO_SUCH_USER"     Client retry=false closes=false "there is no such user";
    41 NotOnline      "NOT_ONLINE"       Peer   retry=true  closes=false "a transient message found no device online";
    42 Conflict       "CONFLICT"         Client retry=false closes=false "this client_seq was used for another message";
    43 StaleClientSeq "STALE_CLIENT_SEQ" Client retry=false closes=false "this client_seq is older than the duplicate filter remembers";
    44 BadRequest     "BAD_REQUEST"      Client retry=false closes=false "a field has a value that is not allowed";
    45 NoSuchConversation "NO_SUCH_CONVERSATION" Client retry=false closes=false "there is no such conversation, or not for this user";
    46 Truncated      "TRUNCATED"        Server retry=false closes=false "these messages are older than what is kept";
    47 BodyTooLarge   "BODY_TOO_LARGE"   Client retry=false closes=false "the message body is larger than a frame can deliver";
    // The server.
    60 Busy           "BUSY"             Server retry=true  closes=false "a queue is full: try again after retry_after_ms";
    61 RateLimited    "RATE_LIMITED"     Client retry=true  closes=false "too many requests: try again after retry_after_ms";
    62 StoreFailed    "STORE_FAILED"     Server retry=true  closes=false "the store failed; whether the message was kept is unknown";
    63 ShuttingDown   "SHUTTING_DOWN"    Server retry=true  closes=false "the server is stopping";
    64 Internal       "INTERNAL"         Server retry=true  closes=false "the server made an error";
    65 TooManyConnections "TOO_MANY_CONNECTIONS" Server retry=true closes=true "this server holds as many connections as it may";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name(), self.text())
    }
}

impl std::error::Error for ErrorCode {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_and_names_are_unique_and_reversible() {
        let mut names = HashSet::new();
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_number(code as u16), Some(code));
            assert!(names.insert(code.name()), "{} twice", code.name());
        }
        assert_eq!(ErrorCode::from_number(0), None);
    }
}
