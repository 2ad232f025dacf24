//! SIGINT and SIGTERM: the first stops the node in order, the second at once. From the first line of a start on, which may
//! take long while the store reads its logs. SIGXFSZ, a file at the size that the process may write, would end it without a
//! word; here it is said, and the write fails like any other. Owned by the main thread; a thread of its own waits for signals.
//!
//! Invariant: a signal is heard by the node's [`Control`] whether it comes before or after that is attached.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use crate::node::EXIT_NOT_CLEAN;
use crate::stop::Control;

/// See the module.
pub struct StopSignals {
    asked: Arc<AtomicBool>,
    control: Arc<Mutex<Option<Arc<Control>>>>,
}

impl StopSignals {
    /// Begins to wait for signals. Errors: those of the system, and "no thread".
    pub fn watch() -> io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGXFSZ])?;
        let this = Self { asked: Arc::default(), control: Arc::default() };
        let (asked, control) = (Arc::clone(&this.asked), Arc::clone(&this.control));
        let watch = move || {
            for signal in signals.forever() {
                if signal == SIGXFSZ {
                    tracing::error!("a file reached the size that this process may write (ulimit -f)");
                    continue;
                }
                let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
                if asked.swap(true, Ordering::Relaxed) {
                    tracing::error!("a second signal: stopping at once");
                    std::process::exit(i32::from(EXIT_NOT_CLEAN));
                }
                tracing::info!("stopping in order ({})", if signal == SIGINT { "SIGINT" } else { "SIGTERM" });
                if let Some(control) = control.as_mut() {
                    control.stop();
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(watch)?;
        Ok(this)
    }

    /// Whether a signal has come.
    pub fn asked(&self) -> &Arc<AtomicBool> {
        &self.asked
    }

    /// Stops this node when a signal comes, or now if one has come.
    pub fn attach(&self, node: Arc<Control>) {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if self.asked.load(Ordering::Relaxed) {
            node.stop();
        }
        *control = Some(node);
    }
}
