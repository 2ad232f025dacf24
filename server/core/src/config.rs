//! What a shard is told at its start. Defaults and bounds of the configurable ones stand in the server's key table.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ringline_cluster::balance::Strategy;
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, ShardIndex};
use ringline_cluster::router::Board;
use ringline_schema::ids::UserName;
use ringline_schema::limits;

/// How many devices of one user may be logged in at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DevicePolicy {
    /// Up to `devices_max`; one more kicks the oldest.
    #[default]
    Many,
    /// One per device kind.
    OnePerKind,
    /// One in all.
    One,
}

/// The cluster that a node belongs to.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Where partitions change hands ([`ClusterPlacement::moving`]) all nodes share one store, and whoever owns what, each
    /// reads all of it.
    pub placement: ClusterPlacement,
    /// Name and client address of every node, in order of its index. Where nodes come and go it is empty: what
    /// [`crate::event::Event::Placement`] says counts.
    pub nodes: Vec<(String, String)>,
}

/// Until when this node may believe that what it owns is still its own, in milliseconds of the clock of
/// [`crate::event::Now::mono_us`]. Pushed on by who keeps the lease; read by every shard.
#[derive(Clone, Debug)]
pub struct Lease(Arc<AtomicU64>);

impl Lease {
    pub fn new(until_ms: u64) -> Self {
        Self(Arc::new(AtomicU64::new(until_ms)))
    }

    pub fn until_ms(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// A time that is earlier than what was said before counts as well.
    pub fn set(&self, until_ms: u64) {
        self.0.store(until_ms, Ordering::Release);
    }
}

/// How ROUTE is answered in a cluster.
#[derive(Clone, Debug, Default)]
pub struct RouteConfig {
    pub strategy: Strategy,
    /// Weights of the nodes for clients, and how many each has.
    pub board: Arc<Board>,
}

/// Settings of a shard.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    pub shard: ShardIndex,
    pub placement: CorePlacement,
    /// `None`: the node is alone.
    pub cluster: Option<ClusterConfig>,
    /// Whether connections of users of other nodes stay here and only their bytes go there
    /// ([`crate::event::Verdict::HandOver`]), instead of being sent there with REDIRECT.
    pub gateway: bool,
    /// `None`: what this node owns is its own whatever happens.
    pub lease: Option<Lease>,
    pub route: RouteConfig,
    /// This node's name and client address, for ROUTE.
    pub node: String,
    pub address: String,
    pub frame_bytes_max: u32,
    /// Bytes waiting for one client; over it durable pushes become LAGGED and transient ones are dropped.
    pub outbox_bytes_max: usize,
    /// No output progress for this long closes the connection.
    pub write_stall_ms: u64,
    pub login_timeout_ms: u64,
    pub idle_timeout_ms: u64,
    pub ping_interval_ms: u64,
    /// Requests a second one connection may make, and how many at once after a pause.
    pub requests_per_s: u32,
    pub requests_burst: u32,
    pub device_policy: DevicePolicy,
    pub devices_max: u16,
    /// A valid token of a name that is not registered creates the user.
    pub token_creates_user: bool,
    /// How long after it was sent a message can be edited or recalled by its sender; later is `AMEND_TOO_LATE`.
    pub amend_window_ms: u64,
    /// Who may BROADCAST, and DELETE_USER others.
    pub admins: Vec<UserName>,
    /// Conversations and users kept in memory by this shard.
    pub conversations_cached_max: usize,
    pub users_cached_max: usize,
    /// Groups kept in memory by this shard, and members of all of them together (about 100 bytes each). A single group
    /// is kept whatever its size.
    pub groups_cached_max: usize,
    pub group_members_cached_max: usize,
    pub connections_max: usize,
    /// Users of this shard that sessions may watch, here and on other shards; one more is `TOO_MANY_WATCHED`.
    pub watched_users_max: usize,
    /// Members online here that a message of a group is given to at once; to more it goes in slices.
    pub fan_out_at_once_max: usize,
    /// What a slice takes, in units: see [`FAN_OUT_VISIT_UNITS`].
    pub fan_out_slice_units: usize,
}

impl CoreConfig {
    /// The defaults, for a shard of a node.
    pub fn new(shard: ShardIndex, placement: CorePlacement) -> Self {
        Self {
            shard,
            placement,
            cluster: None,
            gateway: false,
            lease: None,
            route: RouteConfig::default(),
            node: "ringline".to_owned(),
            address: "127.0.0.1:9700".to_owned(),
            frame_bytes_max: limits::FRAME_BYTES_MAX,
            outbox_bytes_max: 256 * 1024,
            write_stall_ms: 30_000,
            login_timeout_ms: 10_000,
            idle_timeout_ms: 60_000,
            ping_interval_ms: 20_000,
            requests_per_s: 50_000,
            requests_burst: 50_000,
            device_policy: DevicePolicy::Many,
            devices_max: 16,
            token_creates_user: true,
            amend_window_ms: limits::AMEND_WINDOW_MS,
            admins: Vec::new(),
            conversations_cached_max: 65_536,
            users_cached_max: 65_536,
            groups_cached_max: 4_096,
            group_members_cached_max: 200_000,
            connections_max: 100_000,
            watched_users_max: WATCHED_USERS_MAX,
            fan_out_at_once_max: FAN_OUT_AT_ONCE_MAX,
            fan_out_slice_units: FAN_OUT_SLICE_UNITS,
        }
    }
}

/// Records appended and not yet durable, per shard; over it a SEND is answered BUSY.
pub const APPENDS_IN_FLIGHT_MAX: usize = 65_536;
/// As [`CoreConfig::watched_users_max`].
pub const WATCHED_USERS_MAX: usize = 1_048_576;
/// Bytes of the same.
pub const APPEND_BYTES_IN_FLIGHT_MAX: usize = 64 * 1024 * 1024;
/// Questions open at the store, per shard; over it BUSY.
pub const LOADS_IN_FLIGHT_MAX: usize = 4_096;
/// Requests that wait for one loaded conversation or user; over it BUSY.
pub const WAITERS_PER_LOAD_MAX: usize = 1_024;
/// Credential checks open at the workers, per shard; over it BUSY.
pub const WORK_IN_FLIGHT_MAX: usize = 8_192;
/// Delivery acknowledgements a shard waits for; over it BUSY.
pub const DELIVERY_ACKS_MAX: usize = 65_536;
/// Failed logins after which a connection is closed: `TOO_MANY_LOGINS`.
pub const LOGIN_FAILURES_MAX: u8 = 5;
/// Conversations a connection can be told LAGGED about one by one; the rest wait until those are told.
pub const LAGGED_CONVERSATIONS_MAX: usize = 256;
/// Output buffers kept for reuse, per shard.
pub const SPARE_BUFFERS_MAX: usize = 1_024;
/// A larger output buffer is given back to the allocator instead of being kept.
pub const SPARE_BUFFER_BYTES_MAX: usize = 16 * 1024;
/// How often cursors that moved are written: a crash repeats at most this much.
pub const CURSOR_FLUSH_MS: u64 = 1_000;
/// Of these, how many in one turn; the others follow in the next ones.
pub const CURSORS_PER_TURN_MAX: usize = 256;
/// EXPORTs under way, per shard; over it BUSY. Each holds a page.
pub const EXPORTS_IN_FLIGHT_MAX: usize = 64;
/// Questions to the store that one page of an EXPORT may take; then it is answered with what there is.
pub const EXPORT_QUESTIONS_MAX: u32 = 64;
/// Users whose deletion has begun and not ended, per shard; over it DELETE_USER is BUSY.
pub const DELETIONS_MAX: usize = 1_024;
/// Of them, those that work at the same time; the others wait for their turn.
pub const DELETIONS_ACTIVE_MAX: usize = 4;
/// SYNCs under way, per shard; over it BUSY. Each holds a page and the places of its request.
pub const SYNCS_IN_FLIGHT_MAX: usize = 1_024;
/// Questions to the store that one page of a SYNC may take; then it is answered with what there is.
pub const SYNC_QUESTIONS_MAX: u32 = 64;
/// Rows of receipts kept in memory, per shard.
pub const RECEIPTS_CACHED_MAX: usize = 65_536;
/// Conversations whose receipts were told within the last interval, per shard; of one more nobody is told, which is counted.
pub const RECEIPTS_TOLD_MAX: usize = 65_536;
/// Groups whose writers are told of receipts, per shard; of one more the one that rested longest is forgotten.
pub const RECEIPT_GROUPS_MAX: usize = 4_096;
/// RECEIPTS under way, per shard; over it BUSY.
pub const RECEIPT_LISTS_MAX: usize = 16;
/// Members online at a shard that a message of a group is given to at once: about 0.5 ms.
pub const FAN_OUT_AT_ONCE_MAX: usize = 128;
/// Such fan-outs in one turn, in members together and as a multiple of [`FAN_OUT_AT_ONCE_MAX`]; more of them go in slices.
pub const FAN_OUTS_AT_ONCE_MAX: usize = 4;
/// What the fan-outs of a shard may take in one turn, in units: about 128 devices, 0.5 ms with their writes.
pub const FAN_OUT_SLICE_UNITS: usize = 128 * FAN_OUT_VISIT_UNITS;
/// A device that is given something; a member who is looked for is one unit.
pub const FAN_OUT_VISIT_UNITS: usize = 16;
/// Bytes copied to devices that count as one more unit.
pub const FAN_OUT_UNIT_BYTES: usize = 256;
/// Pauses between slices of what is behind are as long as the turn of the slice; shorter ones are not worth a sleep.
pub const FAN_OUT_PAUSE_US_MIN: u64 = 50;
/// The longest, though everyone else kept the core for longer.
pub const FAN_OUT_PAUSE_US_MAX: u64 = 2_000;
/// Messages of one group under way; durable ones over it become LAGGED, transient ones are dropped and counted. Their
/// bytes are bounded by half of what may wait for one client, because each device is given them together.
pub const FAN_OUT_MESSAGES_MAX: usize = 256;
/// Bytes of all groups' messages under way, per shard; over it the same.
pub const FAN_OUT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Groups with messages under way, per shard; for one more the one that waited longest is given out at once.
pub const FAN_OUT_GROUPS_MAX: usize = 4_096;
/// What a client is told to wait after BUSY.
pub const BUSY_RETRY_MS: u32 = 50;
