//! Marks of nodes that are to be drained, as an operator sets them and takes them away: `PREFIX/drains/NAME`. Used by commands.
//!
//! A mark hangs on no lease and on no start: a node that is marked owns nothing, over all its starts, until the mark is gone.
//! What follows from it is the stewards' part, who all look at the marks together with the nodes.

use super::EtcdOptions;
use super::gateway::{EtcdError, Gateway};
use super::wire::{self, Deleted, Done, path};

/// What stands in a mark; fields may come.
const MARK: &[u8] = b"{}";

/// See the module.
#[derive(Debug)]
pub struct Drains {
    gateway: Gateway,
    prefix: String,
}

impl Drains {
    pub fn new(options: &EtcdOptions) -> Self {
        Self { gateway: options.gateway(), prefix: options.drains() }
    }

    /// A mark that is there stays. Errors: [`EtcdError`]; it may be set or not.
    pub async fn mark(&mut self, node: &str) -> Result<(), EtcdError> {
        let key = format!("{}{node}", self.prefix);
        self.gateway.ask::<Done>(path::PUT, &wire::put(&key, MARK)).await.map(|_| ())
    }

    /// Returns whether there was one. Errors: [`EtcdError`]; it may be gone or not.
    pub async fn unmark(&mut self, node: &str) -> Result<bool, EtcdError> {
        let key = format!("{}{node}", self.prefix);
        Ok(self.gateway.ask::<Deleted>(path::DELETE, &wire::delete(&key)).await?.body.deleted > 0)
    }
}
