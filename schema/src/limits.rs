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
/// Before login a connection that has more than this waiting is closed: `BUFFER_FULL`.
pub const BUFFERED_BYTES_MAX_BEFORE_LOGIN: usize = 8 * 1024;
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

/// Rows of one FETCH, ONLINE or CONVERSATIONS page: a larger `limit` is lowered to this.
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

const _: () = assert!(SENDS_IN_FLIGHT_MAX as usize <= DUPLICATE_WINDOW);
const _: () = assert!(FRAME_BYTES_MAX_BEFORE_LOGIN as usize <= BUFFERED_BYTES_MAX_BEFORE_LOGIN);
const _: () = assert!(FRAME_BYTES_MAX <= FRAME_BYTES_CEILING);
const _: () = assert!(USER_NAME_BYTES_MAX * 2 + FRAME_HEADER_BYTES < MESSAGE_OVERHEAD_BYTES_MAX as usize);
const _: () = assert!(TOKEN_BYTES_MAX < FRAME_BYTES_MAX_BEFORE_LOGIN as usize);
