//! The side thread of a node in a cluster of etcd: a small async runtime with the registration, the bell and the steward.
//! Started by the main thread, which it tells when this start may not go on.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::sync::{Notify, watch as changing};
use tokio::time::timeout;

use super::{Registry, Steward, StewardParts};
use crate::etcd::{Keeper, Lost, watch};
use crate::stop::Control;

/// What the main thread keeps of it.
pub struct Running {
    /// Dropped when the cores have ended: the node's key goes.
    entry: changing::Sender<crate::etcd::entry::Entry>,
    thread: JoinHandle<()>,
}

impl Running {
    /// Takes the node's key away and waits for the thread. The cores have ended.
    pub fn end(self) {
        drop(self.entry);
        // A panic there was told by the hook; the node is ending anyway.
        let _ = self.thread.join();
    }
}

/// How the node ends.
pub struct Endings {
    pub control: Arc<Control>,
    /// A drain that takes longer is given up: what is left is taken by others when this node is gone.
    pub drain_timeout: Duration,
    /// Rings when this start may not go on.
    pub lost: Sender<Lost>,
}

/// Starts the thread. `bell`: that of the desk. Errors: no thread, or no runtime.
pub fn start<R: Registry + Send + 'static>(
    parts: StewardParts<R>,
    bell: Arc<Notify>,
    endings: Endings,
) -> io::Result<Running> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let (asked, drain) = changing::channel(false);
    endings.control.before_stop(move || _ = asked.send_replace(true));
    let entry = parts.entry.clone();
    let run = move || runtime.block_on(live(parts, bell, endings, drain));
    let thread = std::thread::Builder::new().name("cluster".into()).spawn(run)?;
    Ok(Running { entry, thread })
}

async fn live<R: Registry>(
    parts: StewardParts<R>,
    bell: Arc<Notify>,
    endings: Endings,
    drain: changing::Receiver<bool>,
) {
    let (etcd, name, clock) = (parts.etcd.clone(), parts.own.name.clone(), parts.clock.clone());
    let first = parts.entry.borrow().clone();
    let registering = Keeper::register(&etcd, &name, first, clock);
    let keeper = tokio::select! {
        keeper = registering => keeper,
        () = asked(drain.clone()) => return endings.control.stop(),
    };
    let keeper = match keeper {
        Ok(keeper) => keeper,
        Err(error) => return lost(&endings, Lost::Start(error.to_string())),
    };
    tracing::info!("node {name} is registered in etcd");
    let entry = parts.entry.subscribe();
    tokio::spawn(watch::ring(etcd, bell));
    let stewarding = async {
        let steward = Steward::new(parts);
        let done = tokio::select! {
            ended = steward.run(drain.clone()) => ended,
            () = overdue(drain.clone(), endings.drain_timeout) => {
                tracing::warn!("not everything was handed over in time: others take the rest when this node is gone");
                Ok(())
            }
        };
        match done {
            Ok(()) => endings.control.stop(),
            Err(error) => lost(&endings, error),
        }
    };
    let keeping = async {
        if let Err(error) = keeper.keep(entry).await {
            lost(&endings, error);
        }
    };
    // Whoever ends first, the other goes on: a node that has handed over everything keeps its key until its cores have ended.
    tokio::join!(stewarding, keeping);
}

/// Returns when the node is asked to stop.
async fn asked(mut drain: changing::Receiver<bool>) {
    if drain.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn overdue(drain: changing::Receiver<bool>, after: Duration) {
    asked(drain).await;
    let _ = timeout(after, std::future::pending::<()>()).await;
}

fn lost(endings: &Endings, lost: Lost) {
    // The main thread is gone only when the process ends.
    let _ = endings.lost.send(lost);
}
