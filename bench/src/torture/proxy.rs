//! A proxy between clients and server that can break every connection at once, at whatever byte it is.
//!
//! Tasks on the round's runtime; they end with it. It gives a client without a server what the server's machine would: a
//! connection that ends.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// See the module.
pub struct Proxy {
    address: SocketAddr,
    cuts: watch::Sender<u64>,
}

impl Proxy {
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (cuts, heard) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let mut heard = heard.clone();
                heard.mark_unchanged();
                tokio::spawn(async move {
                    tokio::select! {
                        () = carry(client, target) => {}
                        _ = heard.changed() => {}
                    }
                });
            }
        });
        Ok(Self { address, cuts })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks every connection that there is.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

async fn carry(mut client: TcpStream, target: SocketAddr) {
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    // Not needed, only quicker.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    // How it ends is what both sides see.
    let _ = copy_bidirectional(&mut client, &mut server).await;
}
