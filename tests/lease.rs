//! Leadership on a real API server: one leads, hand-over at a stop, take-over after a crash, and no two at a time; and
//! what leaders and followers serve with: certificates that two replicas agree on, and forwarding between them.
#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::routing::post;
use bytes::Bytes;
use ebb::serve::certificates::Certificates;
use ebb::serve::forward::{ForwardError, Forwarder};
use ebb::serve::https;
use ebb::serve::lease::{Holder, LeaderState, Leadership, Metrics, Times};
use ebb::serve::tls;
use ebb_lab::cluster::{Cluster, Options};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

struct Replica {
    leadership: Leadership,
    task: JoinHandle<()>,
    stop: CancellationToken,
}

fn replica(cluster: &Cluster, n: usize) -> Replica {
    let stop = CancellationToken::new();
    let me = Holder {
        pod: format!("ebb-controller-{n}"),
        ip: format!("10.77.1.{n}").parse().unwrap(),
    };
    let (leadership, task) = Leadership::start(
        cluster.client(),
        "default",
        me,
        Times::default(),
        Metrics::default(),
        stop.clone(),
    );
    Replica {
        leadership,
        task,
        stop,
    }
}

async fn leads(replica: &Replica) -> u64 {
    let mut state = replica.leadership.state();
    let leading = state.wait_for(|state| matches!(state, LeaderState::Leading { .. }));
    match &*tokio::time::timeout(Duration::from_secs(30), leading)
        .await
        .unwrap()
        .unwrap()
    {
        LeaderState::Leading { term } => *term,
        LeaderState::Following { .. } => unreachable!(),
    }
}

async fn follows(replica: &Replica, pod: &str) {
    let mut state = replica.leadership.state();
    let following = state.wait_for(
        |state| matches!(state, LeaderState::Following { leader: Some(leader) } if leader.pod == pod),
    );
    tokio::time::timeout(Duration::from_secs(30), following)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn race_one_leads_at_a_time() {
    let cluster = Cluster::up(Options::default()).await.unwrap();
    let (one, two) = (replica(&cluster, 1), replica(&cluster, 2));
    // Whichever was first.
    let (leader, follower) = tokio::select! {
        _ = leads(&one) => (one, two),
        _ = leads(&two) => (two, one),
    };
    let term = leads(&leader).await;
    let pod = format!("{:?}", leader.leadership.term_now());
    assert_eq!(pod, format!("Some({term})"));
    assert_eq!(follower.leadership.term_now(), None);
    let lease = cluster
        .kubectl(&[
            "get",
            "lease",
            "ebb-controller",
            "-o",
            "jsonpath={.spec.holderIdentity}",
        ])
        .await
        .unwrap()
        .stdout;
    let (name, _) = lease.split_once('_').unwrap();
    follows(&follower, name).await;

    // A clean stop hands over without waiting for the Lease to run out.
    let began = tokio::time::Instant::now();
    leader.stop.cancel();
    leader.task.await.unwrap();
    assert_eq!(leader.leadership.term_now(), None);
    let next = leads(&follower).await;
    assert!(next > term);
    assert!(
        began.elapsed() < Times::default().duration,
        "the Lease was not given back: {:?}",
        began.elapsed()
    );

    // A crash: nobody gives the Lease back, and the other takes it when it has run out, not before.
    let third = replica(&cluster, 3);
    follows(
        &third,
        if name.ends_with('1') {
            "ebb-controller-2"
        } else {
            "ebb-controller-1"
        },
    )
    .await;
    follower.task.abort();
    let after = leads(&third).await;
    assert!(after > next);
    assert_eq!(follower.leadership.term_now(), None, "two lead");

    // A leader that is cut off from the API server stops by itself, and goes on under a new term.
    let apiserver = cluster.program("kube-apiserver").unwrap();
    apiserver.kill(ebb_lab::cluster::Signal::SIGSTOP).unwrap();
    let mut state = third.leadership.state();
    let stopped = state.wait_for(|state| !matches!(state, LeaderState::Leading { .. }));
    tokio::time::timeout(Times::default().duration, stopped)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(third.leadership.term_now(), None);
    apiserver.kill(ebb_lab::cluster::Signal::SIGCONT).unwrap();
    assert!(leads(&third).await > after);
    third.stop.cancel();
    third.task.await.unwrap();
    cluster.down().await;
}

/// Starts two replicas at the same moment on nothing.
#[tokio::test(flavor = "multi_thread")]
async fn race_two_replicas_agree_on_certificates() {
    let cluster = Cluster::up(Options::default()).await.unwrap();
    let stop = CancellationToken::new();
    let start = || Certificates::start(cluster.client(), "default", stop.clone());
    let (one, two) = tokio::try_join!(start(), start()).unwrap();
    assert_eq!(*one.ca().borrow(), *two.ca().borrow());

    let echo = Router::new().route("/echo", post(|body: Bytes| async move { body }));
    let serve = async |tls: tls::ServerTls| -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("10.77.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(https::serve_https(
            listener,
            tls,
            echo.clone(),
            https::Limits::default(),
            stop.clone(),
        ));
        address
    };
    let (open, mutual) = (serve(one.server()).await, serve(one.mutual_server()).await);
    let name = "ebb-controller.default.svc";
    let forwarder = |tls| Forwarder::new(tls, name.to_owned(), Duration::from_secs(5), 1 << 20);
    let head = || http::Request::post("/echo").body(()).unwrap().into_parts().0;
    // The other replica's certificate is good on both kinds of server.
    let other = forwarder(two.client());
    for address in [open, mutual, mutual] {
        let answer = other
            .forward(address, head(), Bytes::from_static(b"x"))
            .await
            .unwrap();
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (200, &b"x"[..]));
    }
    // The scheduler's too; none at all is not.
    let field = async |secret: &str, key: &str| {
        let path = format!("go-template={{{{index .data \"{key}\" | base64decode}}}}");
        cluster
            .kubectl(&["get", "secret", secret, "-o", &path])
            .await
            .unwrap()
            .stdout
    };
    let identity = ebb::serve::pki::Identity {
        certificate: field("ebb-scheduler-client", "tls.crt").await,
        key: field("ebb-scheduler-client", "tls.key").await,
    };
    let ca = field("ebb-scheduler-client", "ca.crt").await;
    let scheduler = tls::client_config(&ca, Some(&identity)).unwrap();
    let answer = forwarder(tls::ClientTls::new(scheduler))
        .forward(mutual, head(), Bytes::new())
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    let nobody = tls::client_config(&ca, None).unwrap();
    let nobody = forwarder(tls::ClientTls::new(nobody));
    assert!(nobody.forward(open, head(), Bytes::new()).await.is_ok());
    assert!(nobody.forward(mutual, head(), Bytes::new()).await.is_err());
    // A request goes over one hop only, and a leader that is gone is an error in time.
    let mut again = head();
    again
        .headers
        .insert("x-ebb-forwarded", http::HeaderValue::from_static("1"));
    let looped = other.forward(open, again, Bytes::new()).await;
    assert!(matches!(looped, Err(ForwardError::Loop)));
    let gone = other
        .forward("10.77.0.1:1".parse().unwrap(), head(), Bytes::new())
        .await;
    assert!(matches!(gone, Err(ForwardError::Connect { .. })));
    stop.cancel();
    cluster.down().await;
}
