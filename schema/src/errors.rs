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
     8 BufferFull     "BUFFER_FULL"      Client retry=false closes=true  "too many bytes were sent before login (kept for its number: no server says it)";
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
    48 Unsupported    "UNSUPPORTED"      Server retry=false closes=false "this server does not serve this command yet";
    49 TooManyMentions "TOO_MANY_MENTIONS" Client retry=false closes=false "a message may mention at most 100 users";
    50 NoSuchMessage  "NO_SUCH_MESSAGE"  Client retry=false closes=false "there is no such message, or not for this user";
    51 AmendTooLate   "AMEND_TOO_LATE"   Client retry=false closes=false "the time in which this message could be changed is over";
    52 NotAllowed     "NOT_ALLOWED"      Client retry=false closes=false "this user may not do that";
    53 Blocked        "BLOCKED"          Client retry=false closes=false "this user does not take messages from you";
    54 NotAccepted    "NOT_ACCEPTED"     Client retry=false closes=false "this user takes messages only from people they know, or from nobody";
    // The server.
    60 Busy           "BUSY"             Server retry=true  closes=false "a queue is full: try again after retry_after_ms";
    61 RateLimited    "RATE_LIMITED"     Client retry=true  closes=false "too many requests: try again after retry_after_ms";
    62 StoreFailed    "STORE_FAILED"     Server retry=true  closes=false "the store failed; whether the message was kept is unknown";
    63 ShuttingDown   "SHUTTING_DOWN"    Server retry=true  closes=false "the server is stopping";
    64 Internal       "INTERNAL"         Server retry=true  closes=false "the server made an error";
    66 DiskFull       "DISK_FULL"        Server retry=true  closes=false "the server's disk is full: nothing was stored";
    65 TooManyConnections "TOO_MANY_CONNECTIONS" Server retry=true closes=true "this server holds as many connections as it may";
    67 Unavailable    "UNAVAILABLE"      Server retry=true  closes=false "the node or the database that has this is away: try again after retry_after_ms";
    68 Unknown        "UNKNOWN"          Server retry=true  closes=false "the node that was asked is gone; whether it was done is unknown";
    // Groups.
    80 BadGroup       "BAD_GROUP"        Client retry=false closes=false "a group name is # and 1 to 63 bytes, by the rules of user names";
    81 NoSuchGroup    "NO_SUCH_GROUP"    Client retry=false closes=false "there is no such group, or not for this user";
    82 GroupExists    "GROUP_EXISTS"     Client retry=false closes=false "a group of this name exists or existed";
    83 GroupDissolved "GROUP_DISSOLVED"  Client retry=false closes=false "this group was dissolved";
    84 GroupFull      "GROUP_FULL"       Client retry=false closes=false "the group has as many members as it may";
    85 TooManyGroups  "TOO_MANY_GROUPS"  Client retry=false closes=false "this user is in as many groups as a user may be";
    86 NotMember      "NOT_MEMBER"       Client retry=false closes=false "only members of the group may do that";
    87 AlreadyMember  "ALREADY_MEMBER"   Client retry=false closes=false "this user is a member already";
    88 NoSuchMember   "NO_SUCH_MEMBER"   Client retry=false closes=false "this user is not a member, or has no open request";
    89 NotInvited     "NOT_INVITED"      Client retry=false closes=false "this group takes only who is invited";
    90 Muted          "MUTED"            Client retry=false closes=false "this member may not write for a while";
    91 OwnerStays     "OWNER_STAYS"      Client retry=false closes=false "the owner must transfer or dissolve the group first";
    92 TooManyPending "TOO_MANY_PENDING" Client retry=false closes=false "too many invitations and requests of this group are open";
    93 BadTitle       "BAD_TITLE"        Client retry=false closes=false "a title is 1 to 128 bytes of UTF-8 without control characters or outer white space";
    94 TooManyUsers   "TOO_MANY_USERS"   Client retry=false closes=false "a request names at most 100 users";
    95 TextTooLong    "TEXT_TOO_LONG"    Client retry=false closes=false "a text of this request is longer than it may be";
    96 TooManyAdmins  "TOO_MANY_ADMINS"  Client retry=false closes=false "the group has as many administrators as it may";
    // Users and their settings.
    110 NoSuchDevice  "NO_SUCH_DEVICE"   Client retry=false closes=false "this user has no such device";
    111 TooManyPins   "TOO_MANY_PINS"    Client retry=false closes=false "this user has as many pinned conversations as allowed";
    112 TooManyBlocks "TOO_MANY_BLOCKS"  Client retry=false closes=false "the block list is full";
    113 TooManyWatched "TOO_MANY_WATCHED" Client retry=false closes=false "this session watches as many users as it may, or their shard has as many that are watched";
    114 TooManyDevices "TOO_MANY_DEVICES" Client retry=false closes=false "this user has as many devices as allowed (kept for its number: the device seen longest ago is forgotten)";
    115 UserDeleted   "USER_DELETED"     Client retry=false closes=false "this user was deleted";
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
