//! The stand-in model server as a real process, over real connections.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once, mpsc};
use std::time::{Duration, Instant};

use ebb_lab::nvml_state::{STATE_ENV, State};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server and its log; killed when the test is over.
struct Server {
    child: Child,
    address: SocketAddr,
    lines: Mutex<mpsc::Receiver<Value>>,
}

impl Server {
    fn start(flags: &[&str], env: &[(&str, &str)]) -> Self {
        loopback_up();
        static NEXT: AtomicU8 = AtomicU8::new(1);
        // An address of its own for each server, and for each process that runs these tests.
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let last = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = SocketAddr::from((Ipv4Addr::new(127, high.max(1), low, last), 8000));
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command.args([
            "model",
            "--model",
            "m",
            "--token-rate",
            "200",
            "--load-time",
            "0s",
        ]);
        command.args(["--listen", &address.to_string()]).args(flags);
        for name in [
            "NVIDIA_VISIBLE_DEVICES",
            "EBB_GPU_MEMORY_BYTES",
            "EBB_GPU_MEMORY_SHARE",
            STATE_ENV,
        ] {
            command.env_remove(name);
        }
        let mut child = command
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = to.send(serde_json::from_str(&line).unwrap());
            }
        });
        Self {
            child,
            address,
            lines: Mutex::new(lines),
        }
    }

    fn serving(flags: &[&str]) -> Self {
        let server = Self::start(flags, &[]);
        server.wait_for("listening");
        server
    }

    fn wait_for(&self, event: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .lock()
                .unwrap()
                .recv_timeout(left)
                .unwrap_or_else(|e| panic!("no {event}: {e}"));
            if line["event"] == event {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Waits for the end; the exit code and what was on stderr.
    fn end(mut self) -> (Option<i32>, String) {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > until => panic!("it does not end"),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut errors = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut errors)
            .unwrap();
        (status.code(), errors)
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: m\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn get(&self, path: &str) -> (u16, String) {
        answer(self.request("GET", path, "", ""))
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, body) = answer(self.request("POST", path, "", &body.to_string()));
        (status, serde_json::from_str(&body).unwrap())
    }

    fn stream(&self, tokens: u32) -> BufReader<TcpStream> {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "hello there"}], "stream": true,
            "max_tokens": tokens, "stream_options": {"include_usage": true}});
        BufReader::new(self.request("POST", "/v1/chat/completions", "", &body.to_string()))
    }

    fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")))
            .unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn until_metric(&self, name: &str, value: f64) {
        let until = Instant::now() + PATIENCE;
        while self.metric(name) != value {
            assert!(Instant::now() < until, "{name} never became {value}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// In a network namespace of its own (`hack/isolate`) the loopback device starts down.
fn loopback_up() {
    static UP: Once = Once::new();
    UP.call_once(|| {
        if std::env::var_os("EBB_ISOLATED").is_some() {
            let status = Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status()
                .unwrap();
            assert!(status.success());
        }
    });
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The status and the body, put together when it came in chunks.
fn answer(mut stream: TcpStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

/// The next event of a stream and when it came; `None` when the connection ends.
fn next_event(stream: &mut BufReader<TcpStream>) -> Option<(String, Instant)> {
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).unwrap() == 0 {
            return None;
        }
        if let Some(data) = line.strip_prefix("data: ") {
            return Some((data.trim_end().to_owned(), Instant::now()));
        }
    }
}

fn chat(tokens: u32) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": tokens})
}

#[test]
fn answers_as_openai_does() {
    let server = Server::serving(&[]);
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.get("/ping").0, 200);
    let (_, models) = server.get("/v1/models");
    assert!(models.contains("\"id\":\"m\""), "{models}");

    let (status, answer) = server.post("/v1/chat/completions", &chat(3));
    assert_eq!(status, 200);
    assert_eq!(answer["choices"][0]["message"]["content"], "the tide goes");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5})
    );
    let (status, answer) = server.post("/v1/completions", &json!({"prompt": "one two three"}));
    assert_eq!(
        (status, &answer["choices"][0]["finish_reason"]),
        (200, &json!("stop"))
    );
    assert_eq!(server.metric("vllm:generation_tokens_total"), 19.0);
    assert_eq!(server.metric("vllm:prompt_tokens_total"), 5.0);

    for (body, status) in [
        (json!({"model": "other", "messages": [{}]}), 404),
        (json!({"messages": []}), 400),
        (json!({"prompt": "for the other path"}), 400),
        (json!({"messages": [{}], "max_tokens": 0}), 400),
        (json!({"messages": [{}], "max_tokens": 10_000_000_u64}), 400),
        (json!({"messages": "text"}), 400),
        (json!([]), 400),
    ] {
        let (got, answer) = server.post("/v1/chat/completions", &body);
        assert_eq!(got, status, "{body}");
        assert_eq!(answer["error"]["code"], status, "{body}");
        assert!(answer["error"]["message"].is_string());
    }
    assert_eq!(server.get("/nowhere").0, 404);
}

#[test]
fn streams_token_by_token() {
    let server = Server::serving(&["--token-rate", "10"]);
    let begun = Instant::now();
    let mut stream = server.stream(8);
    let events: Vec<_> = std::iter::from_fn(|| next_event(&mut stream)).collect();
    let parsed: Vec<Value> = events[..9]
        .iter()
        .map(|(text, _)| serde_json::from_str(text).unwrap())
        .collect();
    assert_eq!(
        parsed[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": "the"})
    );
    assert_eq!(parsed[1]["choices"][0]["delta"], json!({"content": " tide"}));
    assert_eq!(parsed[6]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(parsed[7]["choices"][0]["finish_reason"], "length");
    assert_eq!(parsed[8]["usage"]["completion_tokens"], 8);
    assert_eq!(events[9].0, "[DONE]");
    assert_eq!(events.len(), 10);
    // 8 tokens at 10 a second: not earlier than 0.8 s, and not all at once.
    assert!(begun.elapsed() >= Duration::from_millis(790));
    assert!(events[7].1 - events[0].1 >= Duration::from_millis(200));
}

#[test]
fn port_is_closed_while_it_loads() {
    let server = Server::start(&["--load-time", "600ms", "--while-loading", "closed"], &[]);
    let begun = server.wait_for("memory")["unix_ms"].as_u64().unwrap();
    let refused = TcpStream::connect(server.address).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let listening = server.wait_for("listening")["unix_ms"].as_u64().unwrap();
    assert!(listening - begun >= 590);
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn port_answers_503_while_it_loads() {
    let server = Server::start(&["--load-time", "600ms", "--while-loading", "503"], &[]);
    let listening = server.wait_for("listening")["unix_ms"].as_u64().unwrap();
    assert_eq!(server.get("/health").0, 503);
    assert_eq!(server.post("/v1/chat/completions", &chat(1)).0, 503);
    assert_eq!(server.get("/env").0, 200);
    let ready = server.wait_for("ready")["unix_ms"].as_u64().unwrap();
    assert!(ready - listening >= 500);
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.post("/v1/chat/completions", &chat(1)).0, 200);
}

#[test]
fn sigterm_finishes_what_has_begun() {
    let server = Server::serving(&["--token-rate", "20"]);
    let mut stream = server.stream(10);
    let idle = TcpStream::connect(server.address).unwrap();
    assert!(next_event(&mut stream).is_some());
    server.signal(Signal::SIGTERM);
    server.wait_for("stopping");
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(server.address).is_ok() {
        assert!(Instant::now() < until, "it still accepts");
        std::thread::sleep(Duration::from_millis(5));
    }
    let rest: Vec<_> = std::iter::from_fn(|| next_event(&mut stream)).collect();
    assert_eq!(rest.last().unwrap().0, "[DONE]");
    assert_eq!(rest.len(), 11);
    // A connection that never asked for anything does not hold it up.
    assert_eq!(server.end().0, Some(0));
    drop(idle);
}

#[test]
fn a_second_sigterm_ends_it_at_once() {
    let server = Server::serving(&["--token-rate", "1"]);
    let mut stream = server.stream(1000);
    assert!(next_event(&mut stream).is_some());
    server.signal(Signal::SIGTERM);
    server.wait_for("stopping");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(143));
}

#[test]
fn sigterm_while_loading_ends_it() {
    let server = Server::start(&["--load-time", "1h"], &[]);
    server.wait_for("memory");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(143));
}

#[test]
fn bounds_what_runs_and_queues_the_rest() {
    let server = Server::serving(&["--max-running", "2", "--token-rate", "1"]);
    let mut streams: Vec<_> = (0..5).map(|_| server.stream(1000)).collect();
    server.until_metric("vllm:num_requests_running", 2.0);
    server.until_metric("vllm:num_requests_waiting", 3.0);
    assert_eq!(server.metric("vllm:kv_cache_usage_perc"), 1.0);
    // One that waits leaves, then one that runs: its place goes to the next.
    streams.pop();
    server.until_metric("vllm:num_requests_waiting", 2.0);
    streams.remove(0);
    server.until_metric("vllm:num_requests_waiting", 1.0);
    server.until_metric("vllm:num_requests_running", 2.0);
    streams.clear();
    server.until_metric("vllm:num_requests_running", 0.0);
    server.until_metric("vllm:num_requests_waiting", 0.0);
}

#[test]
fn a_hundred_at_once_are_all_answered() {
    let server = Server::serving(&["--max-running", "8"]);
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| assert_eq!(server.post("/v1/chat/completions", &chat(2)).0, 200));
        }
    });
}

#[test]
fn an_answer_can_be_held() {
    let server = Server::serving(&[]);
    let begun = Instant::now();
    let stream = server.request(
        "POST",
        "/v1/chat/completions",
        "x-lab-delay-ms: 300\r\n",
        &chat(1).to_string(),
    );
    assert_eq!(answer(stream).0, 200);
    assert!(begun.elapsed() >= Duration::from_millis(300));
}

/// A node's state with two empty GPUs of 24 GiB, half a GiB of each the driver's.
fn gpus(dir: &tempfile::TempDir) -> (PathBuf, Vec<String>) {
    let path = dir.path().join("nvml");
    let state = State::new("node-1", 2, 24 * GIB, GIB / 2, "NVIDIA L4");
    state.create(&path).unwrap();
    (
        path,
        state.devices.into_iter().map(|device| device.uuid).collect(),
    )
}

fn used(path: &Path, uuid: &str) -> u64 {
    State::load(path).unwrap().used(uuid)
}

#[test]
fn takes_memory_and_gives_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let (path, uuids) = gpus(&dir);
    let device = format!("runtime.nvidia.com/gpu={}", uuids[1]);
    let env = [
        ("NVIDIA_VISIBLE_DEVICES", device.as_str()),
        ("EBB_GPU_MEMORY_BYTES", "9663676416"),
        ("EBB_GPU_MEMORY_SHARE", "0.375"),
        (STATE_ENV, path.to_str().unwrap()),
    ];
    let server = Server::start(&[], &env);
    assert_eq!(server.wait_for("env")["EBB_GPU_MEMORY_SHARE"], "0.375");
    server.wait_for("listening");
    assert_eq!(used(&path, &uuids[0]), 0);
    assert_eq!(used(&path, &uuids[1]), 9 * GIB);
    let process = State::load(&path).unwrap().processes[0].clone();
    assert_eq!(process.pid, server.child.id());
    let (_, seen) = server.get("/env");
    assert_eq!(
        serde_json::from_str::<Value>(&seen).unwrap()["NVIDIA_VISIBLE_DEVICES"],
        device
    );
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
    assert_eq!(used(&path, &uuids[1]), 0);
}

#[test]
fn a_share_is_of_the_card_it_got() {
    let dir = tempfile::tempdir().unwrap();
    let (path, uuids) = gpus(&dir);
    let env = [
        ("NVIDIA_VISIBLE_DEVICES", "all"),
        (STATE_ENV, path.to_str().unwrap()),
    ];
    let server = Server::start(&["--gpu-memory-utilization", "0.5"], &env);
    server.wait_for("listening");
    for uuid in &uuids {
        assert_eq!(used(&path, uuid), (24 * GIB - GIB / 2) / 2);
    }
}

#[test]
fn too_little_free_is_said_in_vllms_words() {
    let dir = tempfile::tempdir().unwrap();
    let (path, uuids) = gpus(&dir);
    let env = [
        ("NVIDIA_VISIBLE_DEVICES", uuids[0].as_str()),
        (STATE_ENV, path.to_str().unwrap()),
    ];
    let first = Server::start(&["--memory", "14Gi"], &env);
    first.wait_for("listening");
    let (code, errors) = Server::start(&["--gpu-memory-utilization", "0.5"], &env).end();
    assert_eq!(code, Some(1));
    assert!(
        errors.contains(
            "Free memory on device cuda:0 (9.5/23.5 GiB) on startup is less than desired GPU memory utilization (0.5, \
             11.75 GiB)"
        ),
        "{errors}"
    );
    // Killed, it cannot give its memory back itself; the next one does not count a process that is gone.
    let mut first = first;
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert_eq!(used(&path, &uuids[0]), 14 * GIB);
    let second = Server::start(&["--memory", "20Gi"], &env);
    second.wait_for("listening");
    assert_eq!(used(&path, &uuids[0]), 20 * GIB);
}

#[test]
fn without_a_gpu_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = gpus(&dir);
    let state = (STATE_ENV, path.to_str().unwrap());
    for env in [
        &[("NVIDIA_VISIBLE_DEVICES", "void"), state][..],
        &[state],
        &[("NVIDIA_VISIBLE_DEVICES", "all")],
    ] {
        let (code, errors) = Server::start(&["--memory", "1Gi"], env).end();
        assert_eq!(code, Some(1));
        assert!(errors.contains("No CUDA GPUs are available"), "{errors}");
    }
    let (code, errors) = Server::start(&["--gpu-memory-utilization", "$(EBB_GPU_MEMORY_SHARE)"], &[]).end();
    assert_eq!(code, Some(2));
    assert!(errors.contains("is that variable set?"), "{errors}");
}

#[test]
fn crash_loading() {
    let server = Server::start(&["--fail", "crash-loading", "--load-time", "100ms"], &[]);
    let address = server.address;
    let (code, errors) = server.end();
    assert_eq!(code, Some(1));
    assert!(errors.contains("Engine core initialization failed"), "{errors}");
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn crash_hang_loading() {
    let server = Server::start(&["--fail", "hang-loading", "--while-loading", "503"], &[]);
    server.wait_for("listening");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(server.get("/health").0, 503);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(143));
}

#[test]
fn crash_close_mid_stream() {
    let server = Server::serving(&["--fail", "close-mid-stream"]);
    let mut stream = server.stream(10);
    let events: Vec<_> = std::iter::from_fn(|| next_event(&mut stream)).collect();
    assert_eq!(events.len(), 5);
    let mut whole = String::new();
    let mut plain = server.request("POST", "/v1/chat/completions", "", &chat(4).to_string());
    plain.read_to_string(&mut whole).unwrap();
    let (head, body) = whole.split_once("\r\n\r\n").unwrap();
    let promised = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .unwrap();
    assert!(
        !body.is_empty() && body.len() < promised.parse().unwrap(),
        "{whole}"
    );
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn crash_exit_after() {
    let server = Server::serving(&["--fail", "exit-after=2"]);
    for _ in 0..2 {
        assert_eq!(server.post("/v1/chat/completions", &chat(1)).0, 200);
    }
    assert_eq!(server.end().0, Some(1));
    assert_eq!(
        Server::start(&["--fail", "exit-after=100ms"], &[]).end().0,
        Some(1)
    );
    let server = Server::serving(&["--fail", "error"]);
    assert_eq!(server.post("/v1/chat/completions", &chat(1)).0, 500);
}
