//! What the connections of both sides get: small messages at once, and an end when the other side has vanished.
//!
//! A node that loses its power closes nothing. Without these limits a request to it would hang for good, and a tunnel
//! from it would count as in flight and keep its model awake for good.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// A connection on which nothing came for this long is asked whether the other side is still there, and again every
/// [`AGAIN`].
const QUIET: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_secs(10);
/// An other side that acknowledges nothing for so long is gone. The kernel's own limit is a quarter of an hour.
const GONE: Duration = Duration::from_secs(60);

/// Sets it all. What a kernel does not have is left out.
pub(super) fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(QUIET).with_interval(AGAIN));
    let _ = socket.set_tcp_user_timeout(Some(GONE));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn crash_of_the_other_sides_node_ends_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        prepare(&stream);
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap() && stream.nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), QUIET);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(GONE));
    }
}
