//! The way of a request about chat to the part that serves it. Owned by the shard; keeps nothing.

use ringline_schema::message::ChatRequest;

use crate::event::{ConnId, Effects};
use crate::peer::Origin;
use crate::shard::Shard;

impl Shard {
    pub(crate) fn chat(&mut self, conn: ConnId, request_id: u32, request: ChatRequest<'_>, fx: &mut Effects) {
        let origin = Origin { shard: self.config.shard, conn, request_id };
        let asked = match request {
            ChatRequest::Sync(sync) => self.sync(origin, &sync, fx),
            ChatRequest::Read { conversation, seq } => self.read_upto(origin, (conversation, seq), fx),
            ChatRequest::Receipts { conversation, seq, cursor, limit } => {
                self.receipts(origin, (conversation, seq), (cursor, limit), fx)
            }
            ChatRequest::Mark(mark) => self.mark(origin, mark, fx),
            ChatRequest::Devices => self.devices(origin, fx),
            ChatRequest::DropDevice { device } => self.drop_device(origin, device, fx),
            ChatRequest::Export { cursor } => self.export(origin, cursor, fx),
            ChatRequest::DeleteUser { user, proof, recall } => self.delete_user(origin, (user, proof, recall), fx),
            ChatRequest::Amend(amend) => self.amend(origin, &amend, fx),
            ChatRequest::Broadcast { .. }
            | ChatRequest::Signal { .. }
            | ChatRequest::Watch { .. }
            | ChatRequest::Unwatch { .. }
            | ChatRequest::PresenceSet { .. }
            | ChatRequest::Block { .. }
            | ChatRequest::Unblock { .. }
            | ChatRequest::Blocks { .. }
            | ChatRequest::Privacy { .. } => self.social(conn, request_id, &request, fx),
        };
        if let Err(code) = asked {
            self.sessions.fail(conn, request_id, code, fx);
        }
    }
}
