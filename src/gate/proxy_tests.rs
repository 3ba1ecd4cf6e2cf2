//! The way of a request through a gate on loopback: real sockets, a scaler and a table made by hand.
#![allow(clippy::unwrap_used)]

mod bench;

use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use bench::*;

#[tokio::test]
async fn warm_requests_pass_and_connections_are_used_again() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    let (connected, mut connections) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            connected.send(()).unwrap();
            tokio::spawn(async move {
                loop {
                    let head = read_head(&mut stream).await;
                    if head.is_empty() {
                        return;
                    }
                    stream.write_all(OK.as_bytes()).await.unwrap();
                }
            });
        }
    });
    bench.show_one(1, address);
    for _ in 0..5 {
        let answer = bench.exchange(GET).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("ok"),
            "{answer}"
        );
        assert!(!answer.contains("server-timing"), "nothing was cold: {answer}");
        bench.until_counts((0, 0)).await;
        // The kept connection is put back a moment after the answer has ended.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(connections.recv().await.is_some());
    assert!(connections.try_recv().is_err(), "one connection carried all five");
    assert_eq!(bench.scaler.raised.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_hundred_at_once_are_one_wake_and_a_hundred_answers() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    let _heads = answering(listener, OK);
    bench.show(0, address.port(), &[]);
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(bench.send(GET).await);
    }
    bench.until_counts((0, 100)).await;
    timeout(SOON, async {
        while bench.scaler.raised.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    bench.show_one(1, address);
    for mut client in clients {
        let mut answer = String::new();
        timeout(SOON, client.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer.contains("server-timing: ebb;desc=\"cold\";dur="),
            "{answer}"
        );
    }
    assert_eq!(bench.scaler.raised.load(Ordering::SeqCst), 1);
    assert_eq!(bench.counts(), (0, 0));
}

#[tokio::test]
async fn an_answer_streams_and_counts_until_it_ends() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench
        .send("GET /sse HTTP/1.1\r\nhost: m\r\nte: trailers\r\n\r\n")
        .await;
    let (mut server, _) = listener.accept().await.unwrap();
    let head = read_head(&mut server).await;
    assert!(head.contains("te: trailers"), "{head}");
    server
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n5\r\nfirst\r\n")
        .await
        .unwrap();
    let seen = read_until(&mut client, "first\r\n").await;
    assert!(seen.contains("transfer-encoding: chunked"), "{seen}");
    assert_eq!(bench.counts(), (1, 0));
    let door = bench.gate.door(&workload());
    let (_, known) = door.activity();
    assert_eq!(door.hold(1, 60_000, known).as_deref(), Some("1 in flight"));
    server
        .write_all(b"6\r\nsecond\r\n0\r\nx-sum: 7\r\n\r\n")
        .await
        .unwrap();
    let seen = read_until(&mut client, "0\r\nx-sum: 7\r\n\r\n").await;
    assert!(seen.contains("second"), "{seen}");
    bench.until_counts((0, 0)).await;
}

#[tokio::test]
async fn a_request_body_streams_too() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench
        .send("POST /up HTTP/1.1\r\nhost: m\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    let (mut server, _) = listener.accept().await.unwrap();
    let head = read_head(&mut server).await;
    assert!(
        head.contains("transfer-encoding: chunked") && !head.contains("expect"),
        "{head}"
    );
    read_until(&mut client, "HTTP/1.1 100 Continue\r\n\r\n").await;
    client.write_all(b"3\r\none\r\n").await.unwrap();
    read_until(&mut server, "3\r\none\r\n").await;
    client.write_all(b"3\r\ntwo\r\n0\r\n\r\n").await.unwrap();
    read_until(&mut server, "3\r\ntwo\r\n0\r\n\r\n").await;
    server.write_all(OK.as_bytes()).await.unwrap();
    read_until(&mut client, "ok").await;
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_frees_its_place() {
    let mut bench = Bench::start().await;
    bench.show(0, 1, &[]);
    let with_body = bench
        .send("POST /v1/chat HTTP/1.1\r\nhost: m\r\ncontent-length: 4\r\n\r\nbody")
        .await;
    let without = bench.send("GET / HTTP/1.1\r\nhost: m\r\n\r\n").await;
    bench.until_counts((0, 2)).await;
    drop(with_body);
    bench.until_counts((0, 1)).await;
    drop(without);
    bench.until_counts((0, 0)).await;
}

#[tokio::test]
async fn a_client_that_leaves_mid_answer_ends_the_replicas_work() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench.send("GET / HTTP/1.1\r\nhost: m\r\n\r\n").await;
    let (mut server, _) = listener.accept().await.unwrap();
    read_head(&mut server).await;
    server
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        .await
        .unwrap();
    read_until(&mut client, "first\r\n").await;
    drop(client);
    bench.until_counts((0, 0)).await;
    let mut rest = Vec::new();
    let read = timeout(SOON, server.read_to_end(&mut rest)).await.unwrap();
    assert!(
        read.is_err() || rest.is_empty(),
        "the replica sees its connection close"
    );
}

#[tokio::test]
async fn a_full_queue_and_the_longest_wait_are_answered_with_advice() {
    let mut bench = Bench::start().await;
    bench.limits.queue_requests = 1;
    bench.max_wait = Duration::from_millis(300);
    bench.show(0, 1, &[]);
    let mut first = bench.send(GET).await;
    bench.until_counts((0, 1)).await;
    let refused = bench.exchange(GET).await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert!(
        refused.contains("retry-after: ") && refused.contains("problem+json"),
        "{refused}"
    );
    assert!(refused.contains("queue-requests"), "{refused}");
    let mut answer = String::new();
    timeout(SOON, first.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert_eq!(bench.counts(), (0, 0));
}

#[tokio::test]
async fn a_replica_that_refuses_connections_is_left_out() {
    let mut bench = Bench::start().await;
    let listener = TcpListener::bind(("127.0.0.2", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let _heads = answering(listener, OK);
    // Nothing listens at the first replica's address.
    bench.show(
        2,
        port,
        &[
            ("pod-1", Ipv4Addr::new(127, 0, 0, 3)),
            ("pod-2", Ipv4Addr::new(127, 0, 0, 2)),
        ],
    );
    for _ in 0..4 {
        let answer = bench.exchange(GET).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn a_loaded_replica_that_stops_listening_holds_the_request_until_it_is_back() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    drop(listener);
    bench.show_one(1, address);
    let mut client = bench
        .send("POST / HTTP/1.1\r\nhost: m\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbody")
        .await;
    bench.until_counts((0, 1)).await;
    let listener = TcpListener::bind(address).await.unwrap();
    let (mut server, _) = loop {
        // The first connections only look whether somebody is there.
        let (mut stream, peer) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
        let mut byte = [0];
        if stream.peek(&mut byte).await.unwrap_or(0) == 1 {
            break (stream, peer);
        }
        let _ = stream.shutdown().await;
    };
    read_until(&mut server, "body").await;
    server.write_all(OK.as_bytes()).await.unwrap();
    read_until(&mut client, "ok").await;
}

#[tokio::test]
async fn a_request_that_a_replica_took_is_not_sent_twice() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench.send(GET).await;
    let (mut server, _) = listener.accept().await.unwrap();
    read_head(&mut server).await;
    drop(server);
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert!(
        timeout(Duration::from_millis(100), listener.accept())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_meanwhile_costs_nothing() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    for _ in 0..10 {
        let mut client = bench.send(GET).await;
        let (mut server, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
        read_head(&mut server).await;
        server.write_all(OK.as_bytes()).await.unwrap();
        read_until(&mut client, "ok").await;
        // Kept open by the gate, closed by the server.
        drop(server);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_upgrade_becomes_a_tunnel_that_counts() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench
        .send("GET /ws HTTP/1.1\r\nhost: m\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n")
        .await;
    let (mut server, _) = listener.accept().await.unwrap();
    let head = read_head(&mut server).await;
    assert!(
        head.contains("connection: upgrade") && head.contains("upgrade: websocket"),
        "{head}"
    );
    server
        .write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello",
        )
        .await
        .unwrap();
    let seen = read_until(&mut client, "hello").await;
    assert!(
        seen.starts_with("HTTP/1.1 101") && seen.contains("upgrade: websocket"),
        "{seen}"
    );
    client.write_all(b"ping").await.unwrap();
    read_until(&mut server, "ping").await;
    assert_eq!(bench.counts(), (1, 0));
    client.shutdown().await.unwrap();
    let mut rest = Vec::new();
    timeout(SOON, server.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    server.write_all(b"last words").await.unwrap();
    drop(server);
    read_until(&mut client, "last words").await;
    bench.until_counts((0, 0)).await;
}

#[tokio::test]
async fn health_checkers_neither_wake_nor_count() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    let mut heads = answering(listener, "HTTP/1.1 204 No Content\r\n\r\n");
    bench.show(0, address.port(), &[]);
    let probe = "GET /health HTTP/1.1\r\nhost: m\r\nuser-agent: kube-probe/1.36\r\nconnection: close\r\n\r\n";
    let answer = bench.exchange(probe).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("asleep\n"),
        "{answer}"
    );
    bench.show_one(1, address);
    let answer = bench.exchange(probe).await;
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    assert!(heads.recv().await.unwrap().starts_with("GET /health"));
    assert_eq!(bench.scaler.raised.load(Ordering::SeqCst), 0);
    assert_eq!(bench.gate.door(&workload()).activity().0.idle_ms, None);
}

#[tokio::test]
async fn head_and_old_clients_are_understood() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench
        .send("HEAD /big HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n")
        .await;
    let (mut server, _) = listener.accept().await.unwrap();
    read_head(&mut server).await;
    server
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(
        answer.contains("content-length: 999") && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
    bench.until_counts((0, 0)).await;

    let mut client = bench.send("GET /old HTTP/1.0\r\n\r\n").await;
    // The kept connection serves it.
    let head = read_head(&mut server).await;
    assert!(head.starts_with("GET /old HTTP/1.1\r\n"), "{head}");
    server
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nold\r\n0\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(
        answer.ends_with("\r\n\r\nold") && !answer.contains("chunked"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_wake_that_cannot_succeed_is_said_at_once() {
    let mut bench = Bench::start().await;
    bench.show(0, 1, &[]);
    let mut client = bench.send(GET).await;
    bench.until_counts((0, 1)).await;
    bench
        .gate
        .door(&workload())
        .dismiss(&super::problem::Problem::new(
            super::metrics::Outcome::WakeFailed,
            "image not found",
        ));
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("image not found"),
        "{answer}"
    );
}

#[tokio::test]
async fn stopping_finishes_what_is_open() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut streaming = bench.send("GET /sse HTTP/1.1\r\nhost: m\r\n\r\n").await;
    let (mut server, _) = listener.accept().await.unwrap();
    read_head(&mut server).await;
    server
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        .await
        .unwrap();
    read_until(&mut streaming, "first\r\n").await;
    bench.stop.cancel();
    bench.gate.tracker.close();
    timeout(SOON, async {
        while TcpStream::connect((LOOPBACK, bench.port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .expect("it stops listening");
    server.write_all(b"4\r\nlast\r\n0\r\n\r\n").await.unwrap();
    read_until(&mut streaming, "4\r\nlast\r\n0\r\n\r\n").await;
    timeout(SOON, bench.gate.tracker.wait()).await.unwrap();
}

#[tokio::test]
async fn nothing_is_read_of_a_body_that_the_replica_does_not_take() {
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    bench.show_one(1, address);
    let mut client = bench
        .send("POST / HTTP/1.1\r\nhost: m\r\ncontent-length: 1000000000\r\n\r\n")
        .await;
    let (mut server, _) = listener.accept().await.unwrap();
    read_head(&mut server).await;
    let piece = vec![b'x'; 1 << 20];
    let mut taken = 0u64;
    // The replica reads nothing, so at some point the client cannot write either.
    while let Ok(written) = timeout(Duration::from_millis(500), client.write(&piece)).await {
        taken += written.unwrap() as u64;
        assert!(taken < 100 << 20, "the gate buffers");
    }
    assert!(taken > 0);
}

#[tokio::test]
async fn prior_knowledge_http2_goes_on_as_http2_with_its_trailers() {
    use futures::StreamExt;
    use http_body_util::{BodyExt, StreamBody};
    use hyper::body::{Frame, Incoming};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|request: http::Request<Incoming>| async move {
                assert_eq!(request.version(), http::Version::HTTP_2);
                assert_eq!(request.uri().authority().unwrap(), "model.example");
                assert_eq!(request.headers()["te"], "trailers");
                // An echo, and the status at the end, as gRPC has it.
                let data = request.into_body().into_data_stream();
                let frames = data.map(|data| data.map(Frame::data));
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                let end = futures::stream::once(async { Ok(Frame::trailers(trailers)) });
                Ok::<_, hyper::Error>(http::Response::new(StreamBody::new(frames.chain(end))))
            });
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    bench.show(0, address.port(), &[]);
    let stream = bench.connect().await;
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let (say, said) = tokio::sync::mpsc::channel::<Result<Frame<bytes::Bytes>, std::io::Error>>(4);
    let request = http::Request::post("http://model.example/inference.Call/Stream")
        .header("te", "trailers")
        .body(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(said)))
        .unwrap();
    say.send(Ok(Frame::data("one".into()))).await.unwrap();
    let answer = tokio::spawn(async move { client.send_request(request).await.unwrap() });
    bench.until_counts((0, 1)).await;
    bench.show_one(1, address);
    let mut answer = timeout(SOON, answer).await.unwrap().unwrap();
    assert!(answer.headers().contains_key("server-timing"));
    let first = timeout(SOON, answer.body_mut().frame())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(first.into_data().unwrap(), "one");
    assert_eq!(bench.counts(), (1, 0));
    say.send(Ok(Frame::data("two".into()))).await.unwrap();
    drop(say);
    let rest = timeout(SOON, answer.into_body().collect())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(rest.to_bytes(), "two");
    bench.until_counts((0, 0)).await;
}

#[tokio::test(start_paused = true)]
async fn adversarial_a_client_that_never_speaks_does_not_keep_its_place() {
    let bench = Bench::start().await;
    let mut silent = bench.connect().await;
    // The paused clock leaps to the next timer whatever the sockets have to say: the gate sets its own first.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let closed = timeout(2 * super::listener::IDLE, silent.read(&mut [0])).await;
    assert_eq!(closed.expect("it is closed").unwrap(), 0);
}

#[tokio::test]
async fn adversarial_what_the_client_got_wrong_is_not_blamed_on_the_model() {
    const BAD_CHUNK: &str =
        "POST / HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n";
    const TWO_HOSTS: &str = "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n";
    let mut bench = Bench::start().await;
    let (listener, address) = backend().await;
    let mut heads = answering(listener, OK);
    // Asleep, where the body is read ahead, and awake, where it streams.
    for replicas in [0, 1] {
        if replicas == 0 {
            bench.show(0, 1, &[]);
        } else {
            bench.show_one(1, address);
        }
        for text in [BAD_CHUNK, TWO_HOSTS] {
            let mut client = bench.send(text).await;
            let head = read_head(&mut client).await;
            assert!(head.starts_with("HTTP/1.1 400"), "{replicas} replicas: {head}");
        }
    }
    while let Ok(head) = heads.try_recv() {
        assert!(!head.contains("host: b"), "{head}");
    }
}
