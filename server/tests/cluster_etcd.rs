//! Three real processes with a real etcd and a real PostgreSQL as one chat: started at once, one is killed, one is drained, one
//! is stopped for longer than its lease, while SDK clients write. Nothing that was accepted is lost, and each conversation has
//! one order.

mod common;

use std::time::Duration;

use common::moving::{Cluster, USERS, check, join, log_in, name, write};
use common::sdk::run;

#[test]
fn slow_nodes_are_killed_drained_and_stopped_under_load_and_nothing_is_lost() {
    let mut cluster = Cluster::start();
    let tokens: Vec<String> = (0..USERS).map(|user| cluster.token(&name(user))).collect();
    let addresses = |cluster: &Cluster, of: &[usize]| -> Vec<String> {
        of.iter().map(|at| cluster.servers[*at].address.clone()).collect()
    };
    let all = addresses(&cluster, &[0, 1, 2]);
    let mut accepted = vec![Vec::new(); USERS];
    run(async {
        // Somebody to write to.
        for (user, token) in tokens.iter().enumerate() {
            log_in(&all, (&name(user), token), 1).await.close(Duration::from_secs(1)).await;
        }
        join(&mut accepted, write(&all, &tokens, (1, 20)).await);
        check(&all, &tokens, &accepted).await;
    });

    // Killed in the middle of it: the others have its part when its lease has ended.
    let under_load = |cluster: &mut Cluster, round: u64, of: &[usize], act: &dyn Fn(&mut Cluster)| {
        let (by, tokens) = (addresses(cluster, of), tokens.clone());
        let load = std::thread::spawn(move || {
            let mut accepted = Vec::new();
            run(async { accepted = write(&by, &tokens, (round, 60)).await });
            accepted
        });
        std::thread::sleep(Duration::from_millis(300));
        act(cluster);
        load.join().unwrap()
    };
    let more = under_load(&mut cluster, 2, &[1, 2, 0], &|cluster| cluster.servers[0].kill());
    join(&mut accepted, more);
    cluster.settle(&[1, 2]);
    let left = addresses(&cluster, &[1, 2]);
    run(check(&left, &tokens, &accepted));

    // Back, as another start.
    cluster.servers[0].restart(None);
    cluster.settle(&[0, 1, 2]);

    // Drained: it hands over and ends in order.
    let more = under_load(&mut cluster, 3, &[0, 2, 1], &|cluster| {
        assert_eq!(cluster.servers[1].stop(), Some(0), "{}", cluster.servers[1].log.join("\n"));
    });
    join(&mut accepted, more);
    let left = addresses(&cluster, &[0, 2]);
    run(check(&left, &tokens, &accepted));
    cluster.servers[1].restart(None);
    cluster.settle(&[1]);

    // Stopped for longer than its lease: it finds itself replaced, and ends.
    let more = under_load(&mut cluster, 4, &[0, 1, 2], &|cluster| {
        cluster.servers[2].signal("STOP");
        cluster.settle(&[0, 1]);
        cluster.servers[2].signal("CONT");
        assert_eq!(cluster.servers[2].wait(), Some(1), "{}", cluster.servers[2].log.join("\n"));
    });
    join(&mut accepted, more);
    let left = addresses(&cluster, &[0, 1]);
    run(check(&left, &tokens, &accepted));
    for at in [0, 1] {
        assert_eq!(cluster.servers[at].stop(), Some(0), "{}", cluster.servers[at].log.join("\n"));
    }
}
