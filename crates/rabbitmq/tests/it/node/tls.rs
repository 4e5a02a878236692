//! A client certificate in place of a password: `./tests/run rabbitmq`. It opens a TLS port of the node by
//! `ONLYONCE_RABBITMQ_CTL` and makes the certificates with `openssl`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{NODE, ctl};
use crate::common::*;
use onlyonce_core::driver::{Sink as _, Source as _};
use onlyonce_rabbitmq::{Config, RabbitSink, RabbitSource};

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A private authority, and what it has certified.
struct Authority {
    folder: PathBuf,
}

impl Authority {
    fn new() -> Self {
        let name = format!("tls.{:x}", fastrand::u64(..));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let authority = Self { folder };
        authority.openssl(
            &[
                "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "2",
            ],
            &[
                ("-keyout", "ca.key"),
                ("-out", "ca.pem"),
                ("-subj", "/CN=onlyonce tests"),
            ],
        );
        authority
    }

    fn certify(&self, file: &str, name: &str) {
        let (key, request, pem) = (
            format!("{file}.key"),
            format!("{file}.csr"),
            format!("{file}.pem"),
        );
        let subject = format!("/CN={name}");
        self.openssl(
            &["req", "-new", "-nodes", "-newkey", "rsa:2048"],
            &[("-keyout", &key), ("-out", &request), ("-subj", &subject)],
        );
        let names = self.folder.join("names");
        std::fs::write(names, "subjectAltName=DNS:localhost,IP:127.0.0.1").unwrap();
        self.openssl(
            &["x509", "-req", "-CAcreateserial", "-days", "2"],
            &[
                ("-in", &request),
                ("-CA", "ca.pem"),
                ("-CAkey", "ca.key"),
                ("-out", &pem),
                ("-extfile", "names"),
            ],
        );
    }

    fn openssl(&self, arguments: &[&str], more: &[(&str, &str)]) {
        let mut command = Command::new("openssl");
        command.current_dir(&self.folder).args(arguments);
        more.iter().for_each(|(name, value)| {
            command.args([name, value]);
        });
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn path(&self, file: &str) -> String {
        self.folder.join(file).display().to_string()
    }

    /// An Erlang expression for the PEM file's first entry.
    fn entry(&self, file: &str) -> String {
        let pem = std::fs::read_to_string(self.folder.join(file)).unwrap();
        let pem = pem.replace('\n', "\\n");
        format!("hd(public_key:pem_decode(<<\"{pem}\">>))")
    }

    /// Opens a port of the node that demands a certificate of this authority, whose name is then the user.
    fn open_port(&self) -> u16 {
        let port = free_port();
        let (ca, cert, key) = (
            self.entry("ca.pem"),
            self.entry("server.pem"),
            self.entry("server.key"),
        );
        let plugin = "{ok, Plugins} = application:get_env(rabbit, plugins_dir), \
            [code:add_pathz(Dir) || Dir <- filelib:wildcard(Plugins ++ \"/rabbitmq_auth_mechanism_ssl-*/ebin\") \
            ++ filelib:wildcard(Plugins ++ \"/*.ez/rabbitmq_auth_mechanism_ssl-*/ebin\")], \
            application:load(rabbitmq_auth_mechanism_ssl), \
            application:set_env(rabbit, ssl_cert_login_from, common_name), \
            application:set_env(rabbit, ssl_options, [{verify, verify_peer}]), \
            application:set_env(rabbitmq_auth_mechanism_ssl, name_from, common_name), \
            rabbit_registry:register(auth_mechanism, <<\"EXTERNAL\">>, rabbit_auth_mechanism_ssl), \
            application:set_env(rabbit, auth_mechanisms, ['PLAIN', 'AMQPLAIN', 'EXTERNAL'])";
        let listen = format!(
            "{{_, Ca, _}} = {ca}, {{_, Cert, _}} = {cert}, {{Kind, Key, _}} = {key}, \
            ok = rabbit_networking:start_ssl_listener({port}, [{{cacerts, [Ca]}}, {{cert, Cert}}, \
            {{key, {{Kind, Key}}}}, {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}}], 1)."
        );
        ctl(&["eval", &format!("{plugin}, {listen}")]);
        port
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: ./tests/run rabbitmq"]
async fn a_client_certificate_takes_the_place_of_a_password() {
    let _node = NODE.lock().await;
    let queue = Queue::declare("external", Kind::Quorum, &[]).await;
    let authority = Authority::new();
    authority.certify("server", "localhost");
    authority.certify("client", "guest");
    let port = authority.open_port();
    let with = |more: &str| -> Config {
        let base = format!(
            "amqps://nobody:wrong@localhost:{port}/%2f?queue={}",
            queue.name
        );
        let (ca, cert, key) = (
            authority.path("ca.pem"),
            authority.path("client.pem"),
            authority.path("client.key"),
        );
        let files = format!("cacertfile={ca}&certfile={cert}&keyfile={key}");
        format!("{base}&{files}{more}").parse().unwrap()
    };
    let error = with("").connect().await.unwrap_err();
    assert!(!error.is_retryable(), "the password was believed: {error}");
    let config = with("&auth_mechanism=external");
    let (sink, source) = (
        RabbitSink::new(config.clone()).unwrap(),
        RabbitSource::new(config).unwrap(),
    );
    // The certificate's user is not known here, so none is claimed.
    let message = numbered(0).with_attribute("amqp-user-id", "nobody");
    sink.publish(&[message]).await.remove(0).unwrap();
    assert_eq!(drain(&source, 1).await, ["0"]);
    sink.close().await.unwrap();
    source.close().await.unwrap();
}
