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

            /// No command has a lower limit: a body up to this needs no look at which command it is of.
            pub const ANY_BODY_BYTES_MAX: u32 = {
                let mut least = u32::MAX;
                $(if $max < least { least = $max; })*
                least
            };

            /// Whether the server serves it on a connection that has not logged in.
            pub fn before_login(self) -> bool {
                match self { $(Self::$variant => $before,)* }
            }
        }
    };
}

/// Bodies of a few numbers and names.
const SMALL: u32 = 1024;
/// Bodies of a signal: two names and a few words.
const MEDIUM: u32 = 2 * 1024;
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
    0x010b Read            "READ"             Request body="Read"            max=SMALL, before_login=false;
    0x010c Sync            "SYNC"             Request body="Sync"            max=LARGE, before_login=false;
    0x010d Mark            "MARK"             Request body="Mark"            max=SMALL, before_login=false;
    0x010e Devices         "DEVICES"          Request body="Devices"         max=SMALL, before_login=false;
    0x010f DropDevice      "DROP_DEVICE"      Request body="DropDevice"      max=SMALL, before_login=false;
    0x0110 Receipts        "RECEIPTS"         Request body="Receipts"        max=SMALL, before_login=false;
    0x0111 Broadcast       "BROADCAST"        Request body="Broadcast"       max=LARGE, before_login=false;
    0x0112 Signal          "SIGNAL"           Request body="Signal"          max=MEDIUM, before_login=false;
    0x0113 PresenceWatch   "PRESENCE_WATCH"   Request body="PresenceWatch"   max=LARGE, before_login=false;
    0x0114 PresenceUnwatch "PRESENCE_UNWATCH" Request body="PresenceWatch"   max=LARGE, before_login=false;
    0x0115 PresenceSet     "PRESENCE_SET"     Request body="PresenceSet"     max=SMALL, before_login=false;
    0x0116 Amend           "AMEND"            Request body="Amend"           max=LARGE, before_login=false;
    0x0117 Block           "BLOCK"            Request body="Block"           max=SMALL, before_login=false;
    0x0118 Unblock         "UNBLOCK"          Request body="Block"           max=SMALL, before_login=false;
    0x0119 Blocks          "BLOCKS"           Request body="Blocks"          max=SMALL, before_login=false;
    0x011a Privacy         "PRIVACY"          Request body="Privacy"         max=SMALL, before_login=false;
    0x011b Export          "EXPORT"           Request body="Export"          max=SMALL, before_login=false;
    0x011c DeleteUser      "DELETE_USER"      Request body="DeleteUser"      max=CREDENTIAL, before_login=false;

    0x0140 GroupCreate     "GROUP_CREATE"     Request body="GroupCreate"     max=LARGE, before_login=false;
    0x0141 GroupRename     "GROUP_RENAME"     Request body="GroupAct"        max=SMALL, before_login=false;
    0x0142 GroupPolicy     "GROUP_POLICY"     Request body="GroupAct"        max=SMALL, before_login=false;
    0x0143 GroupJoin       "GROUP_JOIN"       Request body="GroupAct"        max=SMALL, before_login=false;
    0x0144 GroupInvite     "GROUP_INVITE"     Request body="GroupAct"        max=LARGE, before_login=false;
    0x0145 GroupAnswer     "GROUP_ANSWER"     Request body="GroupAct"        max=SMALL, before_login=false;
    0x0146 GroupLeave      "GROUP_LEAVE"      Request body="GroupAct"        max=SMALL, before_login=false;
    0x0147 GroupKick       "GROUP_KICK"       Request body="GroupAct"        max=SMALL, before_login=false;
    0x0148 GroupMute       "GROUP_MUTE"       Request body="GroupAct"        max=SMALL, before_login=false;
    0x0149 GroupRole       "GROUP_ROLE"       Request body="GroupAct"        max=SMALL, before_login=false;
    0x014a GroupTransfer   "GROUP_TRANSFER"   Request body="GroupAct"        max=SMALL, before_login=false;
    0x014b GroupDissolve   "GROUP_DISSOLVE"   Request body="GroupAct"        max=SMALL, before_login=false;
    0x014c GroupMembers    "GROUP_MEMBERS"    Request body="GroupAct"        max=SMALL, before_login=false;
    0x014d GroupInfo       "GROUP_INFO"       Request body="GroupAct"        max=SMALL, before_login=false;

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
    0x020b Done            "DONE"             Answer  body="Done"            max=SMALL, before_login=false;
    0x020c Truncated       "TRUNCATED"        Answer  body="Truncated"       max=SMALL, before_login=false;
    0x020d SyncOk          "SYNC_OK"          Answer  body="SyncOk"          max=LARGE, before_login=false;
    0x020e DevicesOk       "DEVICES_OK"       Answer  body="DevicesOk"       max=LARGE, before_login=false;
    0x020f ReceiptsOk      "RECEIPTS_OK"      Answer  body="ReceiptsOk"      max=LARGE, before_login=false;
    0x0210 BroadcastOk     "BROADCAST_OK"     Answer  body="BroadcastOk"     max=SMALL, before_login=false;
    0x0211 PresenceOk      "PRESENCE_OK"      Answer  body="PresenceOk"      max=LARGE, before_login=false;
    0x0212 BlocksOk        "BLOCKS_OK"        Answer  body="BlocksOk"        max=LARGE, before_login=false;
    0x0213 ExportOk        "EXPORT_OK"        Answer  body="ExportOk"        max=LARGE, before_login=false;
    0x0215 Redirect        "REDIRECT"        Answer  body="RouteOk"         max=SMALL, before_login=true;
    0x0240 GroupOk         "GROUP_OK"         Answer  body="GroupOk"         max=SMALL, before_login=false;
    0x0241 GroupInfoOk     "GROUP_INFO_OK"    Answer  body="GroupInfoOk"     max=SMALL, before_login=false;
    0x0242 MembersOk       "MEMBERS_OK"       Answer  body="MembersOk"       max=LARGE, before_login=false;

    0x0301 Deliver         "DELIVER"          Push    body="Message"         max=LARGE, before_login=false;
    0x0302 Receipt         "RECEIPT"          Push    body="Receipt"         max=SMALL, before_login=false;
    0x0303 Lagged          "LAGGED"           Push    body="Lagged"          max=SMALL, before_login=false;
    0x0304 Kicked          "KICKED"           Push    body="Kicked"          max=SMALL, before_login=false;
    0x0305 Goaway          "GOAWAY"           Push    body="Goaway"          max=SMALL, before_login=false;
    0x0306 ReceiptUpto     "RECEIPT_UPTO"     Push    body="ReceiptUpto"     max=SMALL, before_login=false;
    0x0307 Signalled       "SIGNALLED"        Push    body="SignalPush"      max=MEDIUM, before_login=false;
    0x0308 PresenceChanged "PRESENCE_CHANGED" Push    body="PresenceChanged" max=LARGE, before_login=false;
    0x0309 Notice          "NOTICE"           Push    body="Notice"          max=LARGE, before_login=false;
    0x030a Hidden          "HIDDEN"           Push    body="Read"            max=SMALL, before_login=false;
    0x0340 GroupChanged    "GROUP_CHANGED"    Push    body="GroupChanged"    max=LARGE, before_login=false;
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
            assert!(command.body_bytes_max() >= Command::ANY_BODY_BYTES_MAX);
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
