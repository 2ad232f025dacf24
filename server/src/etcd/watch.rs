//! The bell: rings whenever something under a prefix of etcd may have changed. A task of the side thread.
//!
//! It carries nothing. What is there now is asked for with [`super::Directory::list`], so nothing rests on a watch being whole:
//! it begins with now and rings once it stands, which covers what happened before; an end of it, for whatever reason, rings
//! too. So a revision that was compacted away is never asked for.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::EtcdOptions;
use super::gateway::{EtcdError, Gateway};
use super::wire::{self, Streamed, Watched, path};

/// The longest line of a watch that is read: a change of all keys at once takes less.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// After this a watch is opened anew: one whose server no longer tells it anything is not noticed otherwise.
const WATCH_AGE_MAX: Duration = Duration::from_secs(60);
/// Between two attempts: doubled with every one that fails.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(3);

/// Rings until the task that it runs on is dropped.
pub async fn ring(options: EtcdOptions, bell: Arc<Notify>) {
    let mut gateway = options.gateway();
    let prefix = format!("{}/", options.prefix);
    let mut pause = RETRY_MIN;
    loop {
        match timeout(WATCH_AGE_MAX, watch(&mut gateway, &prefix, &bell)).await {
            // It was long enough, and another one takes its place at once.
            Err(_) => pause = RETRY_MIN,
            Ok(ended) => {
                if ended.stood {
                    pause = RETRY_MIN;
                }
                tracing::debug!("the watch of etcd has ended: {}", ended.why);
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
        bell.notify_one();
    }
}

/// Why a watch ended, and whether it had told anything.
struct Ended {
    stood: bool,
    why: String,
}

async fn watch(gateway: &mut Gateway, prefix: &str, bell: &Notify) -> Ended {
    let mut body = match gateway.open(path::WATCH, &wire::watch_of(prefix)).await {
        Ok(body) => body,
        Err(error) => return Ended { stood: false, why: error.to_string() },
    };
    let mut stood = false;
    let mut buffer = BytesMut::new();
    loop {
        match next(&mut body, &mut buffer).await {
            Ok(watched) if watched.canceled => {
                gateway.forget_token();
                return Ended { stood, why: "etcd has cancelled it".into() };
            }
            Ok(watched) => {
                stood |= watched.created;
                if watched.created || !watched.events.is_empty() {
                    bell.notify_one();
                }
            }
            Err(error) => return Ended { stood, why: error.to_string() },
        }
    }
}

/// The next line of a watch. Errors: it has ended, or says what can't be read.
async fn next(body: &mut Incoming, buffer: &mut BytesMut) -> Result<Watched, EtcdError> {
    let garbage = |why: String| EtcdError::Garbage { path: path::WATCH, why };
    loop {
        if let Some(at) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = buffer.split_to(at);
            buffer.advance(1);
            let watched: Streamed<Watched> =
                serde_json::from_slice(&line).map_err(|error| garbage(error.to_string()))?;
            return Ok(watched.result);
        }
        if buffer.len() > LINE_BYTES_MAX {
            return Err(garbage("a line without an end".into()));
        }
        match body.frame().await {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    buffer.extend_from_slice(data);
                }
            }
            Some(Err(error)) => return Err(garbage(error.to_string())),
            None => return Err(garbage("it was closed".into())),
        }
    }
}
