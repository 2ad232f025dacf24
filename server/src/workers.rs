//! The worker pool: credential checks, which take too long for a reactor. Plain threads of low priority, kept off the
//! reactors' cores where others exist; owned by the node.
//!
//! Two bounded queues: tokens (tens of microseconds) never wait behind more than one password (tens of milliseconds) a
//! thread. A full queue is answered `Busy` at once. Every job that was taken gets exactly one answer, by the channel of
//! the core that asked.

use std::sync::Arc;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use crossbeam_channel::{Receiver, Sender, bounded, select_biased};
use ringline_cluster::placement::ShardIndex;
use ringline_core::config::WORK_IN_FLIGHT_MAX;
use ringline_core::event::{Token, Work, WorkOutcome};

use crate::auth::Verifier;
use crate::wake::Waker;

/// argon2id: 19 MiB, two passes, one lane (the first choice of the OWASP password storage guide).
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// What a password of a user that does not exist is compared with, so that both cases take the same time.
const DUMMY_PASSWORD: &[u8] = b"nobody has this password";
/// Added to the nice value: about a quarter of a reactor's share of a core they have to share.
const NICENESS: i32 = 5;

/// An answer on its way to a core.
#[derive(Debug)]
pub struct Done {
    pub token: Token,
    pub outcome: WorkOutcome,
}

struct Job {
    from: ShardIndex,
    token: Token,
    work: Work,
}

/// Where answers go, one a core.
struct Answers {
    sender: Sender<Done>,
    waker: Arc<Waker>,
}

/// One core's way to the pool.
#[derive(Clone)]
pub struct WorkersHandle {
    core: ShardIndex,
    tokens: Sender<Job>,
    passwords: Sender<Job>,
}

impl WorkersHandle {
    /// Queues work. False when the queue is full: nothing will be answered.
    pub fn submit(&self, token: Token, work: Work) -> bool {
        let queue = match &work {
            Work::VerifyToken { .. } => &self.tokens,
            Work::HashPassword { .. } | Work::VerifyPassword { .. } => &self.passwords,
        };
        queue.try_send(Job { from: self.core, token, work }).is_ok()
    }
}

/// What the pool starts with.
pub struct WorkerOptions {
    pub threads: usize,
    /// Jobs that wait in each of the two queues.
    pub queue: usize,
    /// Core numbers the threads may run on; empty: any.
    pub cores: Vec<usize>,
    pub verifier: Arc<Verifier>,
}

/// Starts the threads. They end when the last handle is dropped.
///
/// Gives one handle and one channel of answers for each waker. Errors: no thread can be started.
pub fn start(options: WorkerOptions, wakers: &[Arc<Waker>]) -> std::io::Result<Vec<(WorkersHandle, Receiver<Done>)>> {
    let (tokens, tokens_in) = bounded::<Job>(options.queue);
    let (passwords, passwords_in) = bounded::<Job>(options.queue);
    let mut answers = Vec::new();
    let mut handles = Vec::new();
    for (at, waker) in wakers.iter().enumerate() {
        // More than a core asks at once in practice; at worst a worker waits for the core, which waits for nobody.
        let (sender, receiver) = bounded(WORK_IN_FLIGHT_MAX);
        answers.push(Answers { sender, waker: waker.clone() });
        let core = ShardIndex(at as u16);
        handles.push((WorkersHandle { core, tokens: tokens.clone(), passwords: passwords.clone() }, receiver));
    }
    let answers = Arc::new(answers);
    let checker = Arc::new(Checker::new(options.verifier).map_err(std::io::Error::other)?);
    for number in 0..options.threads {
        let (tokens, passwords) = (tokens_in.clone(), passwords_in.clone());
        let (answers, checker, cores) = (answers.clone(), checker.clone(), options.cores.clone());
        std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            settle(&cores);
            run(&tokens, &passwords, |job| finish(&checker, &answers, job));
        })?;
    }
    Ok(handles)
}

/// Gives this thread its place and its priority. Failing to is no harm but to latency.
fn settle(cores: &[usize]) {
    if !cores.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        for &core in cores {
            set.set(core);
        }
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
    // On Linux the nice value is a thread's own.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
}

fn run(tokens: &Receiver<Job>, passwords: &Receiver<Job>, mut finish: impl FnMut(Job)) {
    loop {
        let job = select_biased! {
            recv(tokens) -> job => job,
            recv(passwords) -> job => job,
        };
        match job {
            Ok(job) => finish(job),
            Err(_) => return,
        }
    }
}

fn finish(checker: &Checker, answers: &[Answers], job: Job) {
    // A panic in a library must cost one answer, not the pool.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| checker.check(&job.work)))
        .unwrap_or(WorkOutcome::Failed);
    if let Some(answers) = answers.get(usize::from(job.from.0)) {
        // The core is gone only when the node ends.
        let _ = answers.sender.send(Done { token: job.token, outcome });
        answers.waker.wake();
    }
}

/// The checks themselves.
struct Checker {
    argon: Argon2<'static>,
    dummy_hash: String,
    verifier: Arc<Verifier>,
}

impl Checker {
    fn new(verifier: Arc<Verifier>) -> Result<Self, argon2::password_hash::Error> {
        let params = Params::new(MEMORY_KIB, PASSES, LANES, None)?;
        let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let dummy_hash = argon.hash_password(DUMMY_PASSWORD)?.to_string();
        Ok(Self { argon, dummy_hash, verifier })
    }

    fn check(&self, work: &Work) -> WorkOutcome {
        match work {
            Work::HashPassword { password } => match self.argon.hash_password(password.as_bytes()) {
                Ok(hash) => WorkOutcome::Hashed(hash.to_string()),
                Err(error) => {
                    tracing::error!(%error, "hashing a password failed");
                    WorkOutcome::Failed
                }
            },
            Work::VerifyPassword { password, hash } => {
                let right = self.verify(password, hash.as_deref().unwrap_or(&self.dummy_hash));
                // Even the dummy's own password opens nothing.
                WorkOutcome::Verified(right && hash.is_some())
            }
            Work::VerifyToken { token, user } => WorkOutcome::Verified(self.verifier.verify(token, user)),
        }
    }

    fn verify(&self, password: &str, hash: &str) -> bool {
        let Ok(parsed) = PasswordHash::new(hash) else {
            tracing::error!("a stored password hash can't be read");
            return false;
        };
        self.argon.verify_password(password.as_bytes(), &parsed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::ids::UserName;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn pool(threads: usize, queue: usize) -> (WorkersHandle, Receiver<Done>) {
        let verifier = Arc::new(Verifier::for_tests());
        let wakers = [Arc::new(Waker::new().unwrap())];
        start(WorkerOptions { threads, queue, cores: Vec::new(), verifier }, &wakers).unwrap().remove(0)
    }

    fn hash_of(outcome: WorkOutcome) -> String {
        match outcome {
            WorkOutcome::Hashed(hash) => hash,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn passwords_are_hashed_as_promised_and_verified() {
        let (workers, answers) = pool(1, 8);
        let ask = |work| {
            assert!(workers.submit(Token(7), work));
            let done = answers.recv_timeout(PATIENCE).unwrap();
            assert_eq!(done.token, Token(7));
            done.outcome
        };
        let hash = hash_of(ask(Work::HashPassword { password: "correct horse".into() }));
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        let other = hash_of(ask(Work::HashPassword { password: "correct horse".into() }));
        assert_ne!(hash, other, "each hash has its own salt");
        let verify = |password: &str, hash: Option<&str>| {
            ask(Work::VerifyPassword { password: password.into(), hash: hash.map(str::to_owned) })
        };
        assert_eq!(verify("correct horse", Some(&hash)), WorkOutcome::Verified(true));
        assert_eq!(verify("wrong horse", Some(&hash)), WorkOutcome::Verified(false));
        assert_eq!(verify("correct horse", Some("not a hash")), WorkOutcome::Verified(false));
        let dummy = std::str::from_utf8(DUMMY_PASSWORD).unwrap();
        assert_eq!(verify(dummy, None), WorkOutcome::Verified(false), "no user, no login");
    }

    #[test]
    fn a_full_queue_refuses_and_what_was_taken_is_answered() {
        let (workers, answers) = pool(1, 4);
        let taken =
            (0..40).filter(|&n| workers.submit(Token(n), Work::HashPassword { password: "secret".into() })).count();
        assert!((4..40).contains(&taken), "{taken} taken");
        for _ in 0..taken {
            hash_of(answers.recv_timeout(PATIENCE).unwrap().outcome);
        }
        assert!(answers.is_empty());
    }

    #[test]
    fn tokens_overtake_passwords() {
        let (workers, answers) = pool(1, 16);
        for n in 0..8 {
            assert!(workers.submit(Token(n), Work::HashPassword { password: "secret".into() }));
        }
        let user = UserName::new("ann").unwrap();
        assert!(workers.submit(Token(100), Work::VerifyToken { token: "garbage".into(), user }));
        let order: Vec<u64> = (0..9).map(|_| answers.recv_timeout(PATIENCE).unwrap().token.0).collect();
        let place = order.iter().position(|&token| token == 100).unwrap();
        assert!(place < 8, "the token came after every password: {order:?}");
    }
}
