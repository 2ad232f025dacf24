//! Every bound of the wire and of the core, once, with its unit last. What happens at each bound is said beside it.

/// A longer (or empty) user name is refused: `BAD_NAME`.
pub const USER_NAME_BYTES_MAX: usize = 64;
/// Passwords outside this range are refused at REGISTER: `BAD_PASSWORD`.
pub const PASSWORD_BYTES_MIN: usize = 6;
pub const PASSWORD_BYTES_MAX: usize = 256;
/// A longer token is refused: `AUTH_FAILED`.
pub const TOKEN_BYTES_MAX: usize = 2048;

/// The frame header: magic u16, version u8, codec u8, command u16, flags u16, request id u32, body length u32.
pub const FRAME_HEADER_BYTES: usize = 16;
/// Before login a larger frame ends the connection: `FRAME_TOO_LARGE`.
pub const FRAME_BYTES_MAX_BEFORE_LOGIN: u32 = 4 * 1024;
/// After login, the default of `limits.frame_bytes_max`.
pub const FRAME_BYTES_MAX: u32 = 64 * 1024;
/// The largest `limits.frame_bytes_max` that can be configured.
pub const FRAME_BYTES_CEILING: u32 = 1024 * 1024;
/// What a SEND or a DELIVER adds around its body at most: header, names, table.
pub const MESSAGE_OVERHEAD_BYTES_MAX: u32 = 512;

/// Nested FlatBuffers tables; deeper is `BAD_BODY`.
pub const TABLE_DEPTH_MAX: usize = 4;
/// FlatBuffers tables in one request; more is `BAD_BODY`.
pub const TABLES_MAX: usize = 64;
/// FlatBuffers tables in one answer, as a client verifies it.
pub const ANSWER_TABLES_MAX: usize = 2048;

/// Rows of one page (FETCH, CONVERSATIONS, ONLINE, BLOCKS, RECEIPTS): a larger `limit` is lowered to this, and to what surely
/// fits half a frame (128 messages or 64 conversations in one of 64 KiB).
pub const PAGE_ROWS_MAX: u16 = 200;
/// Rows of a page whose `limit` is 0.
pub const PAGE_ROWS_DEFAULT: u16 = 50;

/// Accepted client_seqs a conversation remembers per device. An older repeat is `STALE_CLIENT_SEQ`.
pub const DUPLICATE_WINDOW: usize = 64;
/// Durable sends a device may have unanswered (told in LOGIN_OK); more is `BUSY`.
///
/// Equal to the duplicate window: whatever a client may have to resend is still recognised.
pub const SENDS_IN_FLIGHT_MAX: u32 = 64;
/// A longer delivery-acknowledgement timeout is lowered to this.
pub const ACK_TIMEOUT_MS_MAX: u32 = 60_000;

/// Bytes of a group's name with its `#`; as long as a user's name. Longer is `BAD_GROUP`.
pub const GROUP_NAME_BYTES_MAX: usize = USER_NAME_BYTES_MAX;
/// Bytes of a group's title; longer (or empty) is `BAD_TITLE`.
pub const GROUP_TITLE_BYTES_MAX: usize = 128;
/// Members of a group; one more is `GROUP_FULL`.
pub const GROUP_MEMBERS_MAX: usize = 10_000;
/// Administrators of a group beside its owner; one more is `TOO_MANY_ADMINS`.
pub const GROUP_ADMINS_MAX: usize = 100;
/// Open invitations and requests of a group; one more is `TOO_MANY_PENDING`.
pub const GROUP_PENDING_MAX: usize = 1_000;
/// Groups a user is a member of; one more is `TOO_MANY_GROUPS`. Joins that happen at the same moment may pass it by as
/// many as there are of them.
pub const GROUPS_PER_USER_MAX: usize = 1_000;
/// Times one user's coming and going is remembered for one group; older ranges can no longer be read.
pub const MEMBERSHIP_RANGES_MAX: usize = 16;
/// Bytes of what somebody says who asks to join; longer is `TEXT_TOO_LONG`.
pub const GREETING_BYTES_MAX: usize = 256;
/// A longer mute of a member is shortened to this: ten years.
pub const MUTE_MS_MAX: u64 = 10 * 365 * 24 * 3_600 * 1_000;
/// Users named by one request (members of a new group, invitations, watched users); more is `TOO_MANY_USERS`.
pub const USERS_PER_REQUEST_MAX: usize = 100;
/// Users one message mentions; more is `TOO_MANY_MENTIONS`.
pub const MENTIONS_MAX: usize = 100;

/// Devices of a user that are remembered; one more that logs in makes the server forget the one seen longest ago.
pub const DEVICES_PER_USER_MAX: usize = 64;
/// Bytes of a LOGIN's agent that are kept; the rest is cut.
pub const AGENT_BYTES_MAX: usize = 128;
/// Conversations one user may pin; one more is `TOO_MANY_PINS`.
pub const PINS_MAX: usize = 100;
/// Users one user may block; one more is `TOO_MANY_BLOCKS`.
pub const BLOCKS_MAX: usize = 1_000;
/// Users one session may watch; one more is `TOO_MANY_WATCHED`.
pub const WATCHED_MAX: usize = 1_000;
/// Bytes of a status text; longer is `TEXT_TOO_LONG`.
pub const STATUS_BYTES_MAX: usize = 256;
/// Bytes of a signal's body; longer is `BODY_TOO_LARGE`.
pub const SIGNAL_BYTES_MAX: usize = 1_024;
/// Places one SYNC may name; more is `BAD_REQUEST`.
pub const SYNC_PLACES_MAX: usize = 1_000;
/// How long after it was sent a message can be edited or recalled by its sender; later is `AMEND_TOO_LATE`.
pub const AMEND_WINDOW_MS: u64 = 15 * 60 * 1_000;
/// Receipts of a conversation are pushed at most once in this time.
pub const RECEIPTS_INTERVAL_MS: u64 = 1_000;
/// Changes of presence, and signals that say the same again, are pushed at most once in this time.
pub const PRESENCE_INTERVAL_MS: u64 = 1_000;

const _: () = assert!(GROUP_PENDING_MAX + GROUP_MEMBERS_MAX <= 16_384);
const _: () = assert!(SENDS_IN_FLIGHT_MAX as usize <= DUPLICATE_WINDOW);
const _: () = assert!(FRAME_BYTES_MAX <= FRAME_BYTES_CEILING);
const _: () = assert!(USER_NAME_BYTES_MAX * 2 + FRAME_HEADER_BYTES < MESSAGE_OVERHEAD_BYTES_MAX as usize);
const _: () = assert!(TOKEN_BYTES_MAX < FRAME_BYTES_MAX_BEFORE_LOGIN as usize);
