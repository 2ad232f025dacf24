//! What is judged of processors, their caches and nodes, and of network cards against the core map. Pure; the table is
//! in [`super::checks`].
//!
//! Invariant: nothing here is a `Fail`: the node runs on any of it, only slower or less evenly.

use super::checks::{Judgement, Verdict, bad, ok, unknown};
use super::readings::{CpuQuota, Nic, Readings};
use crate::boot::ranges;

/// An idle state that takes longer to leave is felt by the first message after a pause.
const IDLE_EXIT_US_MAX: u64 = 50;

pub fn cpu_quota(readings: &Readings) -> Judgement {
    match readings.cpu_quota {
        None => unknown(),
        Some(CpuQuota::Unlimited) => ok("none"),
        Some(CpuQuota::Limited { quota_us, period_us }) => {
            let cores = readings.plan.cores.len() as u64;
            let found = format!("{quota_us} µs in {period_us} µs, for {cores} cores");
            if quota_us < period_us.saturating_mul(cores) {
                let mend = "echo max > cpu.max of the group, CPUQuota= empty in the unit, or fewer --cores";
                bad(Verdict::Warn, format!("{found}: less than they can use"), mend)
            } else {
                ok(found)
            }
        }
    }
}

pub fn clocksource(readings: &Readings) -> Judgement {
    match readings.clocksource.as_deref() {
        None => unknown(),
        Some(name @ ("tsc" | "arch_sys_counter" | "kvm-clock")) => ok(name),
        Some(name) => {
            let mend = "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource";
            bad(Verdict::Warn, format!("{name}: slow to read"), mend)
        }
    }
}

pub fn governor(readings: &Readings) -> Judgement {
    let slow: Vec<usize> =
        readings.governors.iter().filter(|(_, name)| name != "performance").map(|(core, _)| *core).collect();
    match readings.governors.first() {
        None => bad(Verdict::Note, "not known here: a virtual machine's host decides", ""),
        Some(_) if slow.is_empty() => ok("performance"),
        Some(_) => {
            let cores = ranges(&slow);
            let mend = format!("cpupower -c {cores} frequency-set -g performance");
            bad(Verdict::Warn, format!("cores {cores} save power"), mend)
        }
    }
}

pub fn idle_states(readings: &Readings) -> Judgement {
    let Some((exit_us, name)) = &readings.idle_state else { return unknown() };
    let found = format!("deepest enabled state {name}, {exit_us} µs to leave");
    if *exit_us > IDLE_EXIT_US_MAX {
        let cores = ranges(&readings.plan.cores);
        bad(Verdict::Warn, found, format!("cpupower -c {cores} idle-set -D {IDLE_EXIT_US_MAX}"))
    } else {
        ok(found)
    }
}

pub fn huge_pages(readings: &Readings) -> Judgement {
    match readings.huge_pages.as_deref() {
        None => unknown(),
        Some("always") => bad(Verdict::Note, "always", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        Some(name) => ok(name),
    }
}

pub fn irqbalance(readings: &Readings) -> Judgement {
    match readings.irqbalance_runs {
        None => unknown(),
        Some(false) => ok("does not run"),
        Some(true) => {
            let cores = ranges(&readings.plan.cores);
            let mend =
                format!("IRQBALANCE_BANNED_CPULIST={cores} in /etc/default/irqbalance; systemctl restart irqbalance");
            let verdict = if spare_cpus(readings).is_empty() { Verdict::Note } else { Verdict::Warn };
            bad(verdict, "runs", mend)
        }
    }
}

/// CPUs without a shard.
fn spare_cpus(readings: &Readings) -> Vec<usize> {
    readings.cpus_online.iter().copied().filter(|cpu| !readings.plan.cores.contains(cpu)).collect()
}

/// The cards, or what is to be said in their place.
fn cards(readings: &Readings) -> Result<&[Nic], Judgement> {
    if readings.plan.listen.ip().is_loopback() {
        Err(ok("clients come over loopback: no card on the way"))
    } else if readings.nics.is_empty() {
        Err(unknown())
    } else {
        Ok(&readings.nics)
    }
}

pub fn nic_queues(readings: &Readings) -> Judgement {
    let nics = match cards(readings) {
        Ok(nics) => nics,
        Err(instead) => return instead,
    };
    let cores = readings.plan.cores.len();
    let texts: Vec<String> = nics.iter().map(|nic| format!("{} {}", nic.name, nic.receive_queues)).collect();
    let found = format!("receive queues: {}", texts.join(", "));
    match nics.iter().find(|nic| nic.receive_queues < cores) {
        Some(nic) => {
            let found = format!("{found}; fewer than {cores} cores");
            bad(Verdict::Note, found, format!("ethtool -L {} combined {cores}, if the card has them", nic.name))
        }
        None => ok(found),
    }
}

pub fn interrupt_affinity(readings: &Readings) -> Judgement {
    let nics = match cards(readings) {
        Ok(nics) => nics,
        Err(instead) => return instead,
    };
    let mut found = Vec::new();
    for nic in nics {
        let Some((number, _)) = nic.interrupts.first() else { continue };
        let mut cpus: Vec<usize> = nic.interrupts.iter().flat_map(|(_, cpus)| cpus).copied().collect();
        cpus.sort_unstable();
        cpus.dedup();
        let text = format!("{}: {} interrupts on CPUs {}", nic.name, nic.interrupts.len(), ranges(&cpus));
        let spare = spare_cpus(readings);
        let crowded = nic.receive_queues > 1 && cpus.len() == 1;
        let met = cpus.iter().any(|cpu| readings.plan.cores.contains(cpu));
        let better = if spare.is_empty() { &readings.cpus_online } else { &spare };
        let mend = format!("echo CPU > /proc/irq/{number}/smp_affinity_list, one of {} each", ranges(better));
        if crowded && readings.cpus_online.len() > 1 {
            return bad(Verdict::Warn, format!("{text}: one CPU serves all its queues"), mend);
        }
        if met && !spare.is_empty() {
            return bad(Verdict::Note, format!("{text}: shards are there, CPUs {} are spare", ranges(&spare)), mend);
        }
        found.push(text);
    }
    if found.is_empty() { unknown() } else { ok(found.join("; ")) }
}

pub fn packet_steering(readings: &Readings) -> Judgement {
    let nics = match cards(readings) {
        Ok(nics) => nics,
        Err(instead) => return instead,
    };
    let cores = readings.plan.cores.len();
    let flows = readings.steering_flows.unwrap_or(0);
    let steered: Vec<&str> = nics.iter().filter(|nic| nic.steers_packets).map(|nic| nic.name.as_str()).collect();
    if let Some(nic) = nics.iter().find(|nic| nic.receive_queues < cores && !nic.steers_packets) {
        let mend = format!(
            "echo {} > /sys/class/net/{}/queues/rx-0/rps_cpus (and the other queues)",
            mask(&readings.plan.cores),
            nic.name
        );
        let found = format!("off; {} has {} queues for {cores} cores", nic.name, nic.receive_queues);
        bad(Verdict::Note, found, mend)
    } else if steered.is_empty() {
        ok("off, and not needed")
    } else if flows == 0 {
        let found = format!("{}: packets are steered, but not to the core of their socket", steered.join(", "));
        let mend = "sysctl -w net.core.rps_sock_flow_entries=32768, and rps_flow_cnt of each queue";
        bad(Verdict::Note, found, mend)
    } else {
        ok(format!("{}: on, {flows} flows", steered.join(", ")))
    }
}

/// CPUs as the kernel writes a mask: groups of 32 bits, highest first.
fn mask(cpus: &[usize]) -> String {
    let highest = cpus.iter().max().copied().unwrap_or(0) / 32;
    let word = |group: usize| {
        let inside = cpus.iter().filter(|cpu| *cpu / 32 == group);
        inside.fold(0u32, |bits, cpu| bits | 1 << (cpu % 32))
    };
    (0..=highest).rev().map(|group| format!("{:08x}", word(group))).collect::<Vec<_>>().join(",")
}

pub fn siblings(readings: &Readings) -> Judgement {
    let cores = &readings.plan.cores;
    if readings.siblings.is_empty() {
        return unknown();
    }
    let mine = |group: &&Vec<usize>| group.iter().filter(|cpu| cores.contains(cpu)).count() > 1;
    let Some(shared) = readings.siblings.iter().find(mine) else { return ok("every shard has a core of its own") };
    let found = format!("CPUs {} are threads of one core, with a shard each", ranges(shared));
    let mut alone: Vec<usize> =
        readings.siblings.iter().filter_map(|group| group.iter().find(|cpu| cores.contains(cpu)).copied()).collect();
    alone.sort_unstable();
    bad(Verdict::Note, found, format!("--cores {}", list(&alone)))
}

/// One number alone would be read as a count.
fn list(cores: &[usize]) -> String {
    match cores {
        [one] => format!("{one}-{one}"),
        many => ranges(many),
    }
}

/// Those of the plan's cores that are in the fullest of the groups.
fn fullest<'a>(cores: &[usize], groups: impl Iterator<Item = &'a Vec<usize>>) -> Vec<usize> {
    let inside = groups.map(|group| cores.iter().copied().filter(|core| group.contains(core)).collect::<Vec<_>>());
    inside.max_by_key(Vec::len).unwrap_or_default()
}

pub fn l3_domains(readings: &Readings) -> Judgement {
    let domains = &readings.l3_domains;
    match domains.as_slice() {
        [] => unknown(),
        [one] => ok(format!("one domain: CPUs {}", ranges(one))),
        many => {
            let texts: Vec<String> = many.iter().map(|domain| ranges(domain)).collect();
            let cores = fullest(&readings.plan.cores, many.iter());
            let mend = format!("--cores {}, if so few are enough", list(&cores));
            bad(Verdict::Note, format!("{} domains: CPUs {}", many.len(), texts.join(" | ")), mend)
        }
    }
}

pub fn numa_nodes(readings: &Readings) -> Judgement {
    let cores = &readings.plan.cores;
    let holds = |(_, cpus): &&(usize, Vec<usize>)| cores.iter().any(|core| cpus.contains(core));
    let mine: Vec<&(usize, Vec<usize>)> = readings.numa_nodes.iter().filter(holds).collect();
    let Some((node, _)) = mine.first() else { return unknown() };
    if mine.len() > 1 {
        let names: Vec<String> = mine.iter().map(|(node, _)| node.to_string()).collect();
        let inside = fullest(cores, mine.iter().map(|(_, cpus)| cpus));
        let mend = format!("--cores {}, and a second node of the service on the rest", list(&inside));
        return bad(Verdict::Note, format!("shards on nodes {}", names.join(", ")), mend);
    }
    let far = |nic: &&Nic| nic.numa_node.is_some_and(|of| of != *node);
    match readings.nics.iter().find(far) {
        Some(nic) if !readings.plan.listen.ip().is_loopback() => {
            let of = nic.numa_node.unwrap_or_default();
            let cpus = readings.numa_nodes.iter().find(|(node, _)| *node == of).map(|(_, cpus)| list(cpus));
            let mend = format!("--cores {}", cpus.unwrap_or_else(|| format!("of node {of}")));
            bad(Verdict::Warn, format!("shards on node {node}, {} on node {of}", nic.name), mend)
        }
        Some(_) | None => ok(format!("all on node {node}")),
    }
}

pub fn isolated(readings: &Readings) -> Judgement {
    covered(readings, readings.isolated.as_deref(), "isolcpus=managed_irq,domain,")
}

pub fn nohz_full(readings: &Readings) -> Judgement {
    covered(readings, readings.nohz_full.as_deref(), "nohz_full=")
}

/// Whether a boot parameter covers the shards' cores, where there are cores left for everything else.
fn covered(readings: &Readings, set: Option<&[usize]>, parameter: &str) -> Judgement {
    let Some(set) = set else { return bad(Verdict::Note, "not set, or not in this kernel", "") };
    let cores = &readings.plan.cores;
    let missing: Vec<usize> = cores.iter().copied().filter(|core| !set.contains(core)).collect();
    if missing.is_empty() {
        return ok(format!("CPUs {}", ranges(set)));
    }
    if spare_cpus(readings).is_empty() {
        return ok("not set; with a shard on every core there is nowhere else to go");
    }
    let found = if set.is_empty() { "not set".to_owned() } else { format!("CPUs {}", ranges(set)) };
    let mend = format!("{parameter}{} on the kernel's command line, then restart", ranges(cores));
    bad(Verdict::Note, format!("{found}; shards on {}", ranges(&missing)), mend)
}

#[cfg(test)]
mod tests {
    use super::super::checks::tests::verdict;
    use super::*;

    #[test]
    fn quotas_clocks_and_power() {
        let limited = |quota_us| Some(CpuQuota::Limited { quota_us, period_us: 100_000 });
        assert_eq!(verdict(cpu_quota, |r| r.cpu_quota = Some(CpuQuota::Unlimited)), Verdict::Ok);
        assert_eq!(verdict(cpu_quota, |r| r.cpu_quota = limited(200_000)), Verdict::Ok);
        assert_eq!(verdict(cpu_quota, |r| r.cpu_quota = limited(150_000)), Verdict::Warn);
        assert_eq!(verdict(clocksource, |r| r.clocksource = Some("tsc".into())), Verdict::Ok);
        assert_eq!(verdict(clocksource, |r| r.clocksource = Some("hpet".into())), Verdict::Warn);
        assert_eq!(verdict(governor, |_| ()), Verdict::Note);
        assert_eq!(verdict(governor, |r| r.governors = vec![(0, "performance".into())]), Verdict::Ok);
        assert_eq!(verdict(governor, |r| r.governors = vec![(0, "powersave".into())]), Verdict::Warn);
        assert_eq!(verdict(idle_states, |r| r.idle_state = Some((1, "C1".into()))), Verdict::Ok);
        assert_eq!(verdict(idle_states, |r| r.idle_state = Some((170, "C6".into()))), Verdict::Warn);
        assert_eq!(verdict(huge_pages, |r| r.huge_pages = Some("madvise".into())), Verdict::Ok);
        assert_eq!(verdict(huge_pages, |r| r.huge_pages = Some("always".into())), Verdict::Note);
    }

    fn nic(receive_queues: usize, interrupts: &[usize]) -> Nic {
        let interrupts = interrupts.iter().map(|&cpu| (40, vec![cpu])).collect();
        Nic { name: "eth0".into(), receive_queues, interrupts, ..Nic::default() }
    }

    fn with_nic(judge: fn(&Readings) -> Judgement, nic: Nic, cpus: usize) -> Verdict {
        verdict(judge, |r| {
            r.plan.listen = ([0, 0, 0, 0], 9_700).into();
            r.cpus_online = (0..cpus).collect();
            r.nics = vec![nic];
        })
    }

    #[test]
    fn interrupts_against_the_core_map() {
        assert_eq!(verdict(irqbalance, |r| r.irqbalance_runs = Some(false)), Verdict::Ok);
        assert_eq!(verdict(irqbalance, |r| r.irqbalance_runs = Some(true)), Verdict::Note);
        let spare = |r: &mut Readings| (r.irqbalance_runs, r.cpus_online) = (Some(true), vec![0, 1, 2]);
        assert_eq!(verdict(irqbalance, spare), Verdict::Warn);
        for judge in [nic_queues, interrupt_affinity, packet_steering] {
            assert_eq!(verdict(judge, |r| r.nics = vec![nic(1, &[0])]), Verdict::Ok, "loopback");
        }
        assert_eq!(with_nic(nic_queues, nic(2, &[]), 2), Verdict::Ok);
        assert_eq!(with_nic(nic_queues, nic(1, &[]), 2), Verdict::Note);
        assert_eq!(with_nic(interrupt_affinity, nic(2, &[0, 1]), 2), Verdict::Ok);
        assert_eq!(with_nic(interrupt_affinity, nic(2, &[0, 1]), 4), Verdict::Note);
        assert_eq!(with_nic(interrupt_affinity, nic(2, &[2, 3]), 4), Verdict::Ok);
        assert_eq!(with_nic(interrupt_affinity, nic(2, &[0, 0]), 2), Verdict::Warn);
        assert_eq!(with_nic(packet_steering, nic(1, &[]), 2), Verdict::Note);
        assert_eq!(with_nic(packet_steering, nic(2, &[]), 2), Verdict::Ok);
        let steered = Nic { steers_packets: true, ..nic(1, &[]) };
        assert_eq!(with_nic(packet_steering, steered, 2), Verdict::Note);
        assert_eq!(mask(&[0, 1, 33]), "00000002,00000003");
    }

    #[test]
    fn threads_caches_and_nodes() {
        assert_eq!(verdict(siblings, |r| r.siblings = vec![vec![0, 2], vec![1, 3]]), Verdict::Ok);
        assert_eq!(verdict(siblings, |r| r.siblings = vec![vec![0, 1]]), Verdict::Note);
        assert_eq!(verdict(l3_domains, |r| r.l3_domains = vec![vec![0, 1]]), Verdict::Ok);
        assert_eq!(verdict(l3_domains, |r| r.l3_domains = vec![vec![0], vec![1]]), Verdict::Note);
        assert_eq!(verdict(numa_nodes, |r| r.numa_nodes = vec![(0, vec![0, 1])]), Verdict::Ok);
        assert_eq!(verdict(numa_nodes, |r| r.numa_nodes = vec![(0, vec![0]), (1, vec![1])]), Verdict::Note);
        let far = |r: &mut Readings| {
            r.plan.listen = ([0, 0, 0, 0], 9_700).into();
            r.numa_nodes = vec![(0, vec![0, 1]), (1, vec![2, 3])];
            r.nics = vec![Nic { numa_node: Some(1), ..nic(2, &[]) }];
        };
        assert_eq!(verdict(numa_nodes, far), Verdict::Warn);
        assert_eq!(fullest(&[0, 1, 2], [vec![0], vec![1, 2, 3]].iter()), [1, 2]);
    }

    #[test]
    fn isolation_is_asked_for_only_where_cores_are_spare() {
        for judge in [isolated, nohz_full] {
            let set = |cpus: usize, covered: &[usize]| {
                verdict(judge, |r| {
                    r.cpus_online = (0..cpus).collect();
                    (r.isolated, r.nohz_full) = (Some(covered.to_vec()), Some(covered.to_vec()));
                })
            };
            assert_eq!(set(2, &[]), Verdict::Ok);
            assert_eq!(set(4, &[]), Verdict::Note);
            assert_eq!(set(4, &[0, 1]), Verdict::Ok);
        }
    }
}
