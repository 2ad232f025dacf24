//! The flush thread of a shard: writes what its index thread hands it into the index, one generation at a time.
//!
//! Apart from the index thread, so that a long flush delays no answer. It ends when the index thread lets go of its line.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::index::IndexError;
use super::indexer::NICENESS;
use super::overlay::Overlay;
use super::rows::Watermark;
use super::{Node, OpenError};

/// A generation, and how far it knows the log.
type Work = (Arc<Overlay>, Watermark);

/// The index thread's line to its flush thread.
pub(super) struct Flusher {
    /// `None` once it is told to end.
    work: Option<Sender<Work>>,
    /// One for each piece of work.
    pub done: Receiver<Result<(), IndexError>>,
    thread: Option<JoinHandle<()>>,
    /// A generation is being written.
    pub busy: bool,
}

impl Flusher {
    pub fn start(node: &Arc<Node>, log: u16) -> Result<Self, OpenError> {
        let (work, wanted) = bounded::<Work>(1);
        let (say, done) = bounded(1);
        let node = Arc::clone(node);
        let body = move || {
            // On Linux the nice value is a thread's own.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
            for (overlay, watermark) in wanted {
                let flushed = node.index.flush(&overlay, log, watermark);
                if let Some(generations) = node.overlays.get(usize::from(log)).filter(|_| flushed.is_ok()) {
                    generations.forget_old();
                }
                // The last one of many rows takes its time to be freed: here, not in the index thread.
                drop(overlay);
                if say.send(flushed).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("flush-{log}")).spawn(body);
        let thread = thread.map_err(|source| OpenError::System { what: "no thread for the index", source })?;
        Ok(Self { work: Some(work), done, thread: Some(thread), busy: false })
    }

    /// Hands over a generation. Only when not [busy](Self::busy).
    pub fn begin(&mut self, overlay: Arc<Overlay>, watermark: Watermark) {
        debug_assert!(!self.busy, "one flush at a time");
        self.busy = self.work.as_ref().is_some_and(|work| work.send((overlay, watermark)).is_ok());
    }
}

/// Waits for what is under way: the index must not outlive its node's lock.
impl Drop for Flusher {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
