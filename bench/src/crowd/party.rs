//! Scenarios group and mix: groups are made and joined, clients log in, do what they are to do, and are judged.
//!
//! Main thread. Members join one after the other and go again, so that nobody is told ten thousand times who came; those who
//! stay away stay away.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ringline_schema::message::group::JoinPolicy;
use ringline_schema::message::{GroupAct, GroupReply, Names, Reply, Request};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until};

use super::line::{Line, SharedDesk, Who, desk};
use super::report::CrowdReport;
use super::seat::{Group, Op, Pace, Plan, Seat, Sums, Task};
use super::{Crowd, Mix};
use crate::Failure;
use crate::cli::RunArgs;
use crate::facts::Machine;
use crate::run::{FILES_EXTRA, raise_file_limit};
use crate::server_process;
use crate::sources::Sources;
use crate::token::Issuer;

/// Logins and joins under way at once.
pub const IN_FLIGHT: usize = 64;
/// From "everybody is there" to the first thing that is due.
const START_DELAY: Duration = Duration::from_millis(300);
const HOUSEKEEPING: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);
/// After everything has arrived: for what comes twice.
const WATCH: Duration = Duration::from_millis(200);
/// How often a pair client writes in scenario group, unless --interval-ms says.
const PAIR_PERIOD_NS: u64 = 100_000_000;
const NS_PER_S: u64 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;

/// Who there is and what each does.
struct Layout {
    names: Vec<String>,
    groups: Vec<Group>,
    /// Members of each group, its owner first.
    members: Vec<Vec<u32>>,
    /// Clients that stay.
    seats: Vec<(u32, Task)>,
    what: String,
}

/// Evenly spread: the `at`th of so many that all act once in a period.
fn staggered(at: u64, of: u64, period_ns: u64) -> Pace {
    let offset_ns = u128::from(period_ns) * u128::from(at) / u128::from(of.max(1));
    Pace::Open { offset_ns: u64::try_from(offset_ns).unwrap_or(0), period_ns }
}

impl Layout {
    fn of(args: &RunArgs, crowd: Crowd, run: u64) -> Result<Self, Failure> {
        if !args.clients.is_multiple_of(2) {
            return Err(Failure::Usage(format!("--clients {}: pairs need an even number", args.clients)));
        }
        let name = |number| format!("#{}-{:08x}-{number}", args.fleet.user_prefix, run as u32);
        let groups = args.crowd.groups;
        match crowd {
            Crowd::Mix => Self::mix(args, (0..groups).map(name).collect()),
            Crowd::Group | Crowd::Sync => Self::group(args, (0..groups).map(name).collect()),
        }
    }

    fn group(args: &RunArgs, names: Vec<String>) -> Result<Self, Failure> {
        let (pairs, members) = (args.clients, args.crowd.members);
        let online = args.crowd.online.unwrap_or(members);
        let senders = args.crowd.senders.min(online);
        if online > members {
            return Err(Failure::Usage(format!("--online {online} is more than --members {members}")));
        }
        let groups = names.len() as u32;
        let period_ns = args.pace.interval_ms.map_or(PAIR_PERIOD_NS, |ms| ms * NS_PER_MS);
        let pair = |client: u32| {
            let pace = Some(staggered(client.into(), pairs.into(), period_ns));
            (client, Task { partner: Some(client ^ 1), group: None, mix: Mix::only(Op::Direct), pace })
        };
        let mut seats: Vec<_> = (0..pairs).map(pair).collect();
        let all_senders = u64::from(groups) * u64::from(senders);
        let group_period_ns = all_senders * NS_PER_S / args.crowd.group_rate;
        for (group, member) in (0..groups).flat_map(|group| (0..online).map(move |member| (group, member))) {
            let at = u64::from(member) * u64::from(groups) + u64::from(group);
            let pace = (member < senders).then(|| staggered(at, all_senders, group_period_ns));
            let task = Task { partner: None, group: Some(group), mix: Mix::only(Op::Group), pace };
            seats.push((pairs + group * members + member, task));
        }
        let what = format!(
            "{groups} groups of {members} members, {online} online, {senders} of them write {} messages a second to all \
             groups; {pairs} clients in pairs write every {} ms",
            args.crowd.group_rate,
            period_ns / NS_PER_MS
        );
        Ok(Self {
            names: args.fleet.names(pairs + groups * members)?,
            groups: names.into_iter().map(|name| Group { name, online: online.into() }).collect(),
            members: (0..groups).map(|group| (0..members).map(|m| pairs + group * members + m).collect()).collect(),
            seats,
            what,
        })
    }

    fn mix(args: &RunArgs, names: Vec<String>) -> Result<Self, Failure> {
        let (clients, groups) = (args.clients, names.len() as u32);
        let mix = args.crowd.mix;
        let members: Vec<Vec<u32>> =
            (0..groups).map(|group| (0..clients).filter(|client| client % groups == group).collect()).collect();
        if mix.0.get(Op::Group as usize).is_some_and(|part| *part > 0) && groups.saturating_mul(2) > clients {
            return Err(Failure::Usage(format!("--groups {groups}: {clients} clients make no {groups} groups")));
        }
        let period_ns = match (args.pace.rate, args.pace.interval_ms) {
            (Some(rate), _) => Some(u64::from(clients) * NS_PER_S / rate.max(1)),
            (None, ms) => ms.map(|ms| ms * NS_PER_MS),
        };
        let task = |client: u32| {
            let pace = period_ns.map_or(Pace::Closed, |period_ns| staggered(client.into(), clients.into(), period_ns));
            let group = client.checked_rem(groups);
            (client, Task { partner: Some(client ^ 1), group, mix, pace: Some(pace) })
        };
        let pace = period_ns.map_or_else(
            || "one thing after the other".to_owned(),
            |period_ns| format!("one thing every {:.1} ms each", period_ns as f64 / NS_PER_MS as f64),
        );
        let parts: Vec<_> = super::OPS.iter().zip(mix.0).map(|(op, part)| format!("{} {part}", op.name())).collect();
        let online = |members: &Vec<u32>| members.len() as u64;
        let groups_of = names.into_iter().zip(&members);
        Ok(Self {
            names: args.fleet.names(clients)?,
            groups: groups_of.map(|(name, members)| Group { name, online: online(members) }).collect(),
            seats: (0..clients).map(task).collect(),
            what: format!("{clients} clients in pairs and {groups} groups, {pace}: {}", parts.join(", ")),
            members,
        })
    }
}

/// What all steps of a run need.
struct Stage {
    sources: Sources,
    tokens: Vec<String>,
    desk: SharedDesk,
    layout: Layout,
}

impl Stage {
    fn who(&self, client: u32) -> Who<'_> {
        let at = client as usize;
        let (name, token) = (self.layout.names.get(at), self.tokens.get(at));
        Who { number: client, name: name.map_or("", String::as_str), token: token.map_or("", String::as_str) }
    }

    /// Logs in, does one thing to the group, and goes.
    async fn act(&self, client: u32, group: u32, act: GroupAct<'_>) -> Result<(), Failure> {
        let mut line = Line::login(&self.sources, self.who(client), &self.desk).await?;
        let name = self.layout.groups.get(group as usize).map_or("", |group| &group.name);
        let done = |reply: &Reply<'_>| matches!(reply, Reply::Group(GroupReply::Ok { .. })).then_some(());
        let answer = line.ask(&Request::Group { group: name, act }, done).await?;
        answer.map_err(|code| super::line::failed("a group", &code))
    }
}

/// Runs so many at once, until all are done or one fails.
async fn all<T: 'static, F: Future<Output = Result<T, Failure>> + 'static>(
    tasks: impl Iterator<Item = F>,
) -> Result<Vec<T>, Failure> {
    let (mut set, mut done) = (JoinSet::new(), Vec::new());
    let took = |joined: Result<Result<T, Failure>, tokio::task::JoinError>| {
        joined.map_err(|error| super::line::failed("a client ended", &error))?
    };
    for task in tasks {
        if set.len() >= IN_FLIGHT
            && let Some(joined) = set.join_next().await
        {
            done.push(took(joined)?);
        }
        set.spawn_local(task);
    }
    while let Some(joined) = set.join_next().await {
        done.push(took(joined)?);
    }
    Ok(done)
}

/// See the module.
pub async fn run(args: &RunArgs, crowd: Crowd, machine: Machine) -> Result<CrowdReport, Failure> {
    let run = rand::random();
    let layout = Layout::of(args, crowd, run)?;
    let tokens = Issuer::load(&args.fleet.issuer_key())?.tokens(&layout.names)?;
    raise_file_limit(layout.seats.len() as u64 + FILES_EXTRA)?;
    let sources = Sources::to(args.fleet.target());
    let stage = Rc::new(Stage { sources, tokens, desk: desk(), layout });
    for (group, members) in (0..).zip(&stage.layout.members) {
        let Some((&owner, others)) = members.split_first() else { continue };
        let (title, join, users) = ("a group of the load generator", JoinPolicy::Open, Names::default());
        stage.act(owner, group, GroupAct::Create { title, join, users }).await?;
        all(others.iter().map(|&client| {
            let stage = Rc::clone(&stage);
            async move { stage.act(client, group, GroupAct::Join { greeting: "" }).await }
        }))
        .await?;
    }
    let lines = all(stage.layout.seats.iter().map(|&(client, task)| {
        let stage = Rc::clone(&stage);
        async move { Ok((client, task, Line::login(&stage.sources, stage.who(client), &stage.desk).await?)) }
    }))
    .await?;
    perform(args, (crowd, run), (&stage, lines), machine).await
}

async fn perform(
    args: &RunArgs,
    (crowd, run): (Crowd, u64),
    (stage, lines): (&Stage, Vec<(u32, Task, Line)>),
    machine: Machine,
) -> Result<CrowdReport, Failure> {
    let epoch = Instant::now();
    let seconds = |seconds: f64| (seconds * NS_PER_S as f64) as u64;
    let start_ns = u64::try_from(START_DELAY.as_nanos()).unwrap_or(0);
    let from_ns = start_ns + seconds(args.warmup);
    let (groups, names) = (stage.layout.groups.clone(), stage.layout.names.clone());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let client_seq_base = u64::try_from(now.as_micros()).unwrap_or(1);
    let (payload_bytes, to_ns) = (args.payload as usize, from_ns + seconds(args.duration));
    let plan = Rc::new(Plan { run, payload_bytes, client_seq_base, names, groups, start_ns, from_ns, to_ns });
    let (sums, (end, ended)) = (Rc::new(RefCell::new(Sums::default())), watch::channel(false));
    let mut tasks = JoinSet::new();
    for (client, task, line) in lines {
        let seat = Seat::new(Rc::clone(&plan), client, task);
        tasks.spawn_local(live(line, seat, (epoch, Rc::clone(&sums)), ended.clone()));
    }
    let server = args.fleet.server();
    let cpu_s = || server.and_then(server_process::sample).map(|sample| sample.cpu_s);
    sleep_until((epoch + Duration::from_nanos(from_ns)).into()).await;
    let before = cpu_s();
    sleep_until((epoch + Duration::from_nanos(to_ns)).into()).await;
    let after = cpu_s();
    drain(&sums, Duration::from_secs_f64(args.drain)).await;
    end.send_replace(true);
    while tasks.join_next().await.is_some() {}
    let sums = sums.borrow();
    let mut report = CrowdReport::new((crowd.name(), stage.layout.what.clone()), &sums, args.duration, machine);
    report.payload_bytes = payload_bytes;
    report.server_cpu_s = before.zip(after).map(|(before, after)| after - before);
    report.unanswered = sums.open;
    Ok(report)
}

/// Until everything is answered and has arrived, and a little longer; or so long.
async fn drain(sums: &RefCell<Sums>, longest: Duration) {
    let began = Instant::now();
    while began.elapsed() < longest {
        let quiet = sums.borrow().open == 0 && sums.borrow().missing() == 0;
        sleep(if quiet { WATCH } else { LOOK }).await;
        if quiet {
            return;
        }
    }
}

/// One client, until the end.
async fn live(
    mut line: Line,
    mut seat: Seat,
    (epoch, sums): (Instant, Rc<RefCell<Sums>>),
    mut ended: watch::Receiver<bool>,
) {
    let now_ns = || u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let (desk, mut out) = (line.desk(), Vec::new());
    let mut ticks = interval(HOUSEKEEPING);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let due_ns = seat.due_ns(now_ns());
        let due = epoch + Duration::from_nanos(due_ns.unwrap_or(0));
        tokio::select! {
            ready = line.socket.readable() => {
                let mut sums = sums.borrow_mut();
                let told = ready.and_then(|()| line.receive(|id, reply| seat.told(id, reply, now_ns(), &mut sums)));
                if told.is_err() {
                    sums.count("DISCONNECTED");
                    break;
                }
            }
            () = sleep_until(due.into()), if due_ns.is_some() => {
                let encoder = &mut desk.borrow_mut().encoder;
                seat.act((due_ns.unwrap_or(0), now_ns()), &mut sums.borrow_mut(), (encoder, &mut out));
            }
            _ = ticks.tick() => seat.acknowledge((&mut desk.borrow_mut().encoder, &mut out)),
            _ = ended.changed() => break,
        }
        if line.write(&out).await.is_err() {
            sums.borrow_mut().count("DISCONNECTED");
            break;
        }
        out.clear();
    }
    seat.finish(&mut sums.borrow_mut());
}
