//! The development cluster itself: it answers as a real one does, and leaves
//! nothing behind however it ends.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ebb_lab::cluster::{API_SERVER, Cluster, KUBERNETES_SERVICE_IP, Options, Signal};
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client, Config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Tests of one program share its children and its namespaces, and these look at both: they take turns.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn hack(script: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(script))
}

/// Waits until `done`; a busy machine gets its time.
fn eventually(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < until, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The command lines of all processes that can be seen from here.
fn command_lines() -> Vec<String> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| !line.is_empty())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .collect()
}

fn runs(what: &str) -> bool {
    command_lines().iter().any(|line| line.contains(what))
}

fn children_of_this_process() -> Vec<String> {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|children| children.split_whitespace().map(String::from).collect::<Vec<_>>())
        .collect()
}

/// What one GET of a path gives to a client without rights of its own.
async fn get_as(cluster: &Cluster, token: Option<String>) -> Result<String, kube::Error> {
    let mut config = Config::new(API_SERVER.parse().unwrap());
    config.root_cert_file = Some(cluster.dir().join("certificates/ca.crt"));
    config.auth_info.token = token.map(Into::into);
    let request = http::Request::get("/api/v1/namespaces/default/pods")
        .body(Vec::new())
        .unwrap();
    Client::try_from(config).unwrap().request_text(request).await
}

fn is_forbidden(answer: &Result<String, kube::Error>) -> bool {
    matches!(answer, Err(kube::Error::Api(status)) if status.code == 403)
}

#[tokio::test]
async fn e2e_a_cluster_answers_as_a_real_one_and_is_gone_after_down() {
    let _turn = TURN.lock().await;
    let cluster = Cluster::up(Options::default()).await.unwrap();
    let dir = cluster.dir().to_owned();
    TcpStream::connect((KUBERNETES_SERVICE_IP, 443))
        .await
        .expect("the API server by its ClusterIP");
    let nodes = Api::<Node>::all(cluster.client())
        .list(&ListParams::default())
        .await
        .unwrap();
    assert!(nodes.items.is_empty(), "the Node for kube-proxy has stayed");

    // A Service reaches a process on a pod IP.
    let listener = TcpListener::bind("10.77.3.4:8123").await.unwrap();
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            connection.write_all(b"hello").await.unwrap();
        }
    });
    cluster
        .apply(
            r#"
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: default}
spec: {clusterIP: 10.96.7.7, ports: [{name: tcp, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hello-1, namespace: default, labels: {kubernetes.io/service-name: hello}}
addressType: IPv4
ports: [{name: tcp, port: 8123}]
endpoints: [{addresses: [10.77.3.4], conditions: {ready: true}}]
"#,
        )
        .await
        .unwrap();
    let mut said = String::new();
    for _ in 0..200 {
        // Refused until kube-proxy has seen the slice.
        if let Ok(mut connection) = TcpStream::connect("10.96.7.7:80").await {
            connection.read_to_string(&mut said).await.unwrap();
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(said, "hello");

    // The controllers run: a Deployment gets its pod, and nothing to run on.
    cluster
        .kubectl(&["create", "deployment", "idle", "--image=idle:1"])
        .await
        .unwrap()
        .success()
        .unwrap();
    let wait = ["wait", "--for=condition=PodScheduled=false", "--timeout=60s"];
    cluster
        .kubectl(&[&wait[..], &["pod", "-l", "app=idle"]].concat())
        .await
        .unwrap()
        .success()
        .unwrap();
    let refused = cluster.kubectl(&["get", "nothing"]).await.unwrap();
    assert!(!refused.status.success() && refused.stderr.contains("nothing"));

    // RBAC: who was given nothing may do nothing.
    assert!(is_forbidden(&get_as(&cluster, None).await), "anonymous");
    let token = cluster
        .kubectl(&["create", "token", "default"])
        .await
        .unwrap()
        .success()
        .unwrap();
    let token = token.stdout.trim().to_owned();
    assert!(is_forbidden(&get_as(&cluster, Some(token.clone())).await));
    let grant = ["create", "rolebinding", "view", "--clusterrole=view"];
    cluster
        .kubectl(&[&grant[..], &["--serviceaccount=default:default"]].concat())
        .await
        .unwrap()
        .success()
        .unwrap();
    let mut answer = get_as(&cluster, Some(token.clone())).await;
    for _ in 0..200 {
        if answer.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        answer = get_as(&cluster, Some(token.clone())).await;
    }
    answer.expect("what was granted is allowed");

    cluster.down().await;
    assert_eq!(children_of_this_process(), Vec::<String>::new());
    assert!(!runs("kube-apiserver") && !runs("etcd"));
    assert!(!dir.exists(), "{} is still there", dir.display());
}

#[tokio::test]
async fn programs_are_killed_restarted_and_ended_with_the_cluster() {
    let _turn = TURN.lock().await;
    let cluster = Cluster::up(Options::default()).await.unwrap();
    // No rule, no answer: without a limit of its own the attempt would take two minutes.
    let stale = tokio::time::timeout(Duration::from_secs(1), TcpStream::connect("10.96.7.7:80")).await;
    assert!(
        !matches!(stale, Ok(Ok(_))),
        "a Service of another cluster has stayed"
    );
    let mut command = Command::new("bash");
    command.args(["-c", "echo begun; sleep 3141"]);
    let program = cluster.spawn("sleeper", command).unwrap();
    let log = program.log().to_owned();
    let begun = |times: usize| {
        eventually("the program has begun", || {
            std::fs::read_to_string(&log).unwrap().matches("begun").count() == times
        });
    };
    begun(1);
    let first = program.pid().unwrap();
    program.kill(Signal::SIGKILL).unwrap();
    program.wait().await;
    assert!(program.pid().is_none() && program.kill(Signal::SIGTERM).is_err());
    program.restart().await.unwrap();
    begun(2);
    assert_ne!(program.pid().unwrap(), first);

    // The API server comes back by itself on a restart, with what etcd kept.
    cluster
        .program("kube-apiserver")
        .unwrap()
        .restart()
        .await
        .unwrap();
    let mut version = None;
    for _ in 0..600 {
        if let Ok(found) = cluster.client().apiserver_version().await {
            version = Some(found);
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(version.unwrap().major, "1");

    drop(cluster);
    assert!(program.ended().is_some());
    assert_eq!(children_of_this_process(), Vec::<String>::new());
}

#[tokio::test]
async fn a_program_that_does_not_come_up_is_named_with_its_log() {
    let _turn = TURN.lock().await;
    let options = Options {
        apiserver_flags: vec!["--no-such-flag".into()],
        ..Options::default()
    };
    let error = Cluster::up(options)
        .await
        .err()
        .expect("an API server with a wrong flag");
    let said = format!("{error:#}");
    assert!(said.contains("kube-apiserver ended"), "{said}");
    assert!(said.contains("unknown flag: --no-such-flag"), "{said}");
}

/// A process in an isolate of its own, although this test runs in one already.
fn isolated(command: &[&str], runtime_dir: &Path) -> Child {
    hack("isolate")
        .args(command)
        .env_remove("EBB_ISOLATED")
        .env("XDG_RUNTIME_DIR", runtime_dir)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn send(child: &Child, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

#[test]
fn isolate_passes_exit_codes_and_output_on() {
    let _turn = TURN.blocking_lock();
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)] {
        let output = hack("isolate")
            .args(["bash", "-c", &format!("echo out; echo err >&2; {script}")])
            .env_remove("EBB_ISOLATED")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code), "{script}");
        assert_eq!(output.stdout, b"out\n");
        assert_eq!(output.stderr, b"err\n");
    }
}

#[test]
fn crash_nothing_outlives_an_isolate_whatever_signal_ends_it() {
    let _turn = TURN.blocking_lock();
    let dir = tempfile::tempdir().unwrap();
    let signals = [
        (Signal::SIGKILL, None),
        (Signal::SIGTERM, Some(143)),
        (Signal::SIGINT, Some(130)),
        (Signal::SIGHUP, Some(129)),
    ];
    for (number, (signal, code)) in signals.into_iter().enumerate() {
        // A number that no other process here has on its command line.
        let length = format!("{}{number}", std::process::id() + 50_000);
        let sleep = format!("sleep {length}");
        // One that the command is waiting for, and one that has left its session.
        let script = format!("setsid -f {sleep}.5; {sleep}");
        let mut outer = isolated(&["bash", "-c", &script], dir.path());
        eventually("both run", || {
            runs(&format!("{sleep}.5")) && command_lines().contains(&format!("{sleep} "))
        });
        send(&outer, signal);
        assert_eq!(outer.wait().unwrap().code(), code, "{signal}");
        eventually("all is gone", || !runs(&length));
    }
}

/// Where `lab up` in an isolate says that it runs.
fn record(runtime_dir: &Path) -> Option<PathBuf> {
    let records = std::fs::read_dir(runtime_dir).ok()?.flatten().next()?;
    let files = std::fs::read_dir(records.path()).ok()?.flatten();
    files
        .map(|file| file.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "json"))
}

fn enter(runtime_dir: &Path, command: &[&str]) -> std::process::Output {
    hack("enter")
        .args(command)
        .env_remove("EBB_ISOLATED")
        .env("XDG_RUNTIME_DIR", runtime_dir)
        .output()
        .unwrap()
}

#[test]
fn crash_parallel_labs_do_not_see_each_other_and_leave_nothing() {
    let _turn = TURN.blocking_lock();
    let lab = env!("CARGO_BIN_EXE_lab");
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let dirs = dirs.each_ref().map(tempfile::TempDir::path);
    let mut labs = dirs.map(|dir| isolated(&[lab, "up"], dir));
    for dir in dirs {
        eventually("the lab is up", || record(dir).is_some());
    }
    assert!(
        enter(dirs[0], &["kubectl", "create", "namespace", "mine"])
            .status
            .success()
    );
    let seen = |dir| {
        let output = enter(dir, &["kubectl", "get", "namespaces", "-o", "name"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("namespace/mine")
    };
    assert!(seen(dirs[0]) && !seen(dirs[1]));

    // One ends as asked and the other does not notice.
    send(&labs[0], Signal::SIGTERM);
    assert_eq!(labs[0].wait().unwrap().code(), Some(0));
    assert!(record(dirs[0]).is_none());
    assert!(!enter(dirs[0], &["true"]).status.success());
    assert!(!seen(dirs[1]));

    // The other is killed from outside.
    let text = std::fs::read_to_string(record(dirs[1]).unwrap()).unwrap();
    let files: serde_json::Value = serde_json::from_str(&text).unwrap();
    let dir = files["dir"].as_str().unwrap();
    assert!(runs(dir));
    send(&labs[1], Signal::SIGKILL);
    labs[1].wait().unwrap();
    eventually("all is gone", || !runs(dir));
    // Its record is stale now, and says so to nobody.
    let output = enter(dirs[1], &["true"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("no lab runs"));
    assert!(record(dirs[1]).is_none());
    // No lab is left to sweep its folder in this test.
    std::fs::remove_dir_all(dir).unwrap();
}
