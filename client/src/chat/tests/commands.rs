//! Every command of the prompt, typed once: what the server is asked for it, and what is shown. Wrong ones are told how they
//! are written, and ask nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use super::*;
use crate::ConversationId;

impl Seat {
    /// Types a line, waits for what it prints, and gives what the server was asked for it.
    async fn asks(&mut self, server: &FakeServer, line: &str, printed: &str) -> Vec<String> {
        server.asked();
        self.output.0.lock().unwrap().clear();
        self.types(line);
        self.output.wait_for(printed).await;
        server.asked()
    }

    /// Types lines, each with the one request that it makes and what it prints.
    async fn ask_all(&mut self, server: &FakeServer, lines: &[(&str, &str, &str)]) {
        for (line, asked, printed) in lines {
            assert_eq!(self.asks(server, line, printed).await, [*asked], "{line}");
        }
    }
}

#[test]
fn every_command_of_groups_is_sent() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let mut ann = sit_down(&server, "ann", 1).await;
        let create = |title: &str, join: &str| format!("#team Create {{ title: {title:?}, join: {join}, users: [] }}");
        let (invite, open, approval) = (create("The team", "Invite"), create("#team", "Open"), create("T", "Approval"));
        let lines = [
            ("/group create #team The team", &*invite, "✓ #team\n"),
            ("/group create-open #team", &*open, "✓ #team\n"),
            ("/group create-approval #team T", &*approval, "✓ #team\n"),
            ("/group rename #team Two  words", "#team Rename { title: \"Two  words\" }", "✓ #team\n"),
            ("/group policy #team open", "#team Policy { join: Open }", "✓ #team\n"),
            ("/group policy #team approval", "#team Policy { join: Approval }", "✓ #team\n"),
            ("/group policy #team invite", "#team Policy { join: Invite }", "✓ #team\n"),
            ("/group join #team let me in", "#team Join { greeting: \"let me in\" }", "asked to join; wait"),
            ("/group join \"#our team\"", "#our team Join { greeting: \"\" }", "✓ #our team: asked"),
            ("/group invite #team bob", "#team Invite { users: [\"bob\"] }", "✓ #team\n"),
            ("/group approve #team bob", "#team Answer { user: \"bob\", approve: true }", "✓ #team\n"),
            ("/group reject #team bob", "#team Answer { user: \"bob\", approve: false }", "✓ #team\n"),
            ("/group decline #team", "#team Answer { user: \"ann\", approve: false }", "✓ #team\n"),
            ("/group leave #team", "#team Leave", "✓ #team\n"),
            ("/group kick #team bob", "#team Kick { user: \"bob\" }", "✓ #team\n"),
            ("/group mute #team bob 90", "#team Mute { user: \"bob\", for_ms: 90000 }", "✓ #team\n"),
            ("/group mute #team bob 0", "#team Mute { user: \"bob\", for_ms: 0 }", "✓ #team\n"),
            ("/group admin #team bob", "#team Role { user: \"bob\", role: Admin }", "✓ #team\n"),
            ("/group member #team bob", "#team Role { user: \"bob\", role: Member }", "✓ #team\n"),
            ("/group transfer #team \"b b\"", "#team Transfer { user: \"b b\" }", "✓ #team\n"),
            ("/group dissolve #team", "#team Dissolve", "✓ #team\n"),
            ("/group info #team", "#team Info", "The \u{fffd}team: 3 members, owner ann, by approval, dissolved\n"),
        ];
        ann.ask_all(&server, &lines).await;
        let asked = ann.asks(&server, "/group members #team", "  ann (owner)\n  bob (administrator)\n  cid\n").await;
        let page = |cursor: &str, standing: &str| {
            format!("#team Members {{ cursor: {cursor:?}, limit: 0, standing: {standing} }}")
        };
        assert_eq!(asked, [page("", "Member"), page("bob", "Member")]);
        ann.types("/group pending #team");
        let asked = ann.asks(&server, "/group", "/group policy #NAME HOW").await;
        assert_eq!(asked, [page("", "Invited"), page("", "Asked")]);
        let shown = ann.leave().await;
        assert!(shown.contains("  dan is invited\n") && !shown.contains("nobody is invited"), "{shown}");
    });
}

#[test]
fn people_and_devices_are_kept_at_the_prompt() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let mut ann = sit_down(&server, "ann", 1).await;
        let [me, bob] = ["ann", "bob"].map(|name| UserName::new(name).unwrap());
        let id = ConversationId::with(&me, &bob);
        let mark = |pinned: &str, muted: &str| {
            format!("Mark(Mark {{ conversation: {id:?}, pinned: {pinned}, muted_until_ms: {muted} }})")
        };
        let (pin, unpin, loud) = (mark("Some(true)", "None"), mark("Some(false)", "None"), mark("None", "Some(0)"));
        let lines = [
            ("/block bob", "Block { user: \"bob\" }", "blocked\n"),
            ("/unblock bob", "Unblock { user: \"bob\" }", "not blocked any more\n"),
            ("/privacy anyone", "Privacy { messages_from: Some(Anyone) }", "settled\n"),
            ("/privacy known", "Privacy { messages_from: Some(Known) }", "settled\n"),
            ("/privacy nobody", "Privacy { messages_from: Some(Nobody) }", "settled\n"),
            ("/watch bob", "Watch { users: [\"bob\"] }", "bob is away\n"),
            ("/unwatch bob", "Unwatch { users: [\"bob\"] }", "not watched any more\n"),
            ("/status at  lunch", "PresenceSet { status: Some(\"at  lunch\"), visible: None }", "status set\n"),
            ("/status", "PresenceSet { status: Some(\"\"), visible: None }", "status set\n"),
            ("/visible on", "PresenceSet { status: None, visible: Some(true) }", "others see you\n"),
            ("/visible off", "PresenceSet { status: None, visible: Some(false) }", "others do not see you\n"),
            ("/notice x", "Broadcast { kind: Text, device_kinds: 0, body: [120] }", "told 3 devices\n"),
            ("/pin bob", &pin, "pinned\n"),
            ("/unpin bob", &unpin, "not pinned any more\n"),
            ("/mute bob 0", &loud, "not muted any more\n"),
            ("/drop 2", "DropDevice { device: DeviceId(2) }", "logged out\n"),
        ];
        ann.ask_all(&server, &lines).await;
        let hour_ahead_ms = || (SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64) + 3_600_000;
        let earliest = hour_ahead_ms();
        let asked = ann.asks(&server, "/mute bob 1", "muted\n").await.concat();
        let until = asked.strip_prefix(mark("None", "Some(").strip_suffix(" })").unwrap()).unwrap();
        let until: u64 = until.strip_suffix(") })").unwrap().parse().unwrap();
        assert!((earliest..=hour_ahead_ms()).contains(&until), "{asked}");
        let asked =
            ann.asks(&server, "/blocks", "messages from who you have written to; blocked:\n  bob\n  cid\n").await;
        assert_eq!(asked.len(), 2, "{asked:?}");
        ann.asks(&server, "/devices", "  1: Desktop first \u{fffd}, online, this one, last login 2023").await;
        ann.output.wait_for("  2: Desktop second, away, last login 2023").await;
        let seen = "message 7: received by 2 of 3, read by 1\n  bob has read it\n  cid has received it\n  dan does not have it yet\n";
        let asked = ann.asks(&server, "/seen bob 7", seen).await;
        let page =
            |cursor: &str| format!("Receipts {{ conversation: {id:?}, seq: Seq(7), cursor: {cursor:?}, limit: 0 }}");
        assert_eq!(asked, [page(""), page("cid")]);
        ann.leave().await;
    });
}

#[test]
fn a_message_to_a_group_mentions_and_one_to_a_user_does_not() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        for name in ["bob", "#team"] {
            server.add_user(name, PASSWORD);
        }
        let mut ann = sit_down(&server, "ann", 1).await;
        let lines = [
            ("/msg #team @bob, look", "to #team: [\"bob\"]", "✓ 1\n"),
            ("@all and @\"Jürgen 老师\"", "to #team: [\"Jürgen 老师\"] and all", "✓ 2\n"),
        ];
        ann.ask_all(&server, &lines).await;
        assert!(ann.asks(&server, "nobody", "✓ 3\n").await.is_empty());
        assert!(ann.asks(&server, "/msg bob @bob @all", "✓ 1\n").await.is_empty());
        ann.leave().await;
    });
}

#[test]
fn wrong_commands_are_told_how_they_are_written_and_ask_nothing() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let mut ann = sit_down(&server, "ann", 1).await;
        let lines = [
            ("/block", "/block NAME\n"),
            ("/unblock", "/unblock NAME\n"),
            ("/watch", "/watch NAME\n"),
            ("/unwatch", "/unwatch NAME\n"),
            ("/notice", "/notice TEXT\n"),
            ("/privacy friends", "/privacy anyone, /privacy known or /privacy nobody\n"),
            ("/visible perhaps", "/visible on or /visible off\n"),
            ("/pin", "/pin NAME or /unpin NAME\n"),
            ("/unpin", "/pin NAME or /unpin NAME\n"),
            ("/mute bob", "/mute NAME HOURS, 0 to end it\n"),
            ("/mute bob soon", "/mute NAME HOURS, 0 to end it\n"),
            ("/drop bob", "/drop ID, as /devices shows it\n"),
            ("/seen bob", "/seen NAME N; N is"),
            ("/seen bob 0", "/seen NAME N; N is"),
            ("/seen", "/seen NAME N; N is"),
            ("/history bob 201", "/history NAME [N], N from 1 to 200\n"),
            ("/delete-user", "/delete-user NAME [recall]\n"),
            ("/msg", "to whom? /msg NAME TEXT\n"),
            ("/to", "to whom? /msg NAME TEXT\n"),
            ("/group", "/group create #NAME [TITLE]"),
            ("/group create", "/group create #NAME [TITLE]"),
            ("/group nonsense #team", "/group create #NAME [TITLE]"),
            ("/group create team", ErrorCode::BadGroup.text()),
            ("/group rename #team", "/group rename #NAME TITLE\n"),
            ("/group policy #team", "/group policy #NAME open, approval or invite\n"),
            ("/group policy #team all", "/group policy #NAME open, approval or invite\n"),
            ("/group mute #team bob", "/group mute #NAME USER SECONDS\n"),
            ("/group invite #team", "/group invite #NAME USER\n"),
            ("/group approve #team", "/group approve #NAME USER\n"),
            ("/group reject #team", "/group reject #NAME USER\n"),
            ("/group kick #team", "/group kick #NAME USER\n"),
            ("/group admin #team", "/group admin #NAME USER\n"),
            ("/group member #team", "/group member #NAME USER\n"),
            ("/group transfer #team", "/group transfer #NAME USER\n"),
            ("/help", "/quit               leave"),
            ("/blocked", "no command /blocked; /help lists them\n"),
        ];
        for (line, usage) in lines {
            let asked = ann.asks(&server, line, usage).await;
            assert!(asked.is_empty(), "{line}: {asked:?}");
        }
        ann.leave().await;
    });
}

#[test]
fn a_refusal_is_told_in_words() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let mut ann = sit_down(&server, "ann", 1).await;
        let code = ErrorCode::NotAllowed;
        let of_group = format!("✗ #team: {}\n", code.text());
        for line in ["/group policy #team open", "/group members #team", "/group pending #team", "/group info #team"] {
            server.refuse(code);
            ann.asks(&server, line, &of_group).await;
        }
        let plain = format!("{}\n", code.text());
        for line in ["/block bob", "/blocks", "/notice x", "/seen bob 1", "/pin bob", "/drop 2", "/devices"] {
            server.refuse(code);
            ann.asks(&server, line, &plain).await;
        }
        ann.leave().await;
    });
}

/// Each command of the help, and each verb of groups, begins a line that a test types.
#[test]
fn no_command_is_left_untyped() {
    let typed = [include_str!("../tests.rs"), include_str!("commands.rs")].concat();
    let commands = HELP.split([' ', '\n', ';', ',']).filter(|word| word.starts_with('/')).map(str::to_owned);
    let verbs = groups::HELP.lines().filter_map(|line| line.strip_prefix("/group ")?.split_whitespace().next());
    let verbs = verbs.flat_map(|verbs| verbs.split('|')).map(|verb| format!("/group {verb}"));
    let all: Vec<_> = commands.chain(verbs).collect();
    assert!(all.len() > 40, "{all:?}");
    for command in all {
        let begins = [format!("\"{command} "), format!("\"{command}\""), format!("(\"{command} ")];
        assert!(begins.iter().any(|text| typed.contains(text)), "no test types {command}");
    }
}
