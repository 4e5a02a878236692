//! Connections that break, stall and lose answers, through a proxy.

use std::time::Duration;

use onlyonce_postgres::Config;
use onlyonce_testkit::proxy::{Proxy, Storm};
use onlyonce_testkit::{store_suite, transactional_store_suite};
use url::Url;

use crate::support::{Scene, URL, Work, environment, write_effect};

struct Faulty {
    scene: Scene,
    proxy: Proxy,
}

impl Faulty {
    async fn new() -> Self {
        let scene = Scene::new().await;
        let url: Url = environment(URL).parse().unwrap();
        let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        let proxy = Proxy::to(server).await.unwrap();
        Self { scene, proxy }
    }

    fn config(&self) -> Config {
        let mut config = self.scene.config();
        let connect = config.connect.clone().port(self.proxy.port());
        config.connect = connect.options([("search_path", &self.scene.schema)]);
        config
    }
}

mod through_the_proxy {
    use super::*;

    async fn scene() -> Scene {
        let url: Url = environment(URL).parse().unwrap();
        let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        let proxy = Proxy::to(server).await.unwrap();
        let mut through = url.clone();
        through.set_port(Some(proxy.port())).unwrap();
        Scene::at(through.as_str(), "").await.keeping(proxy)
    }

    store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        scene().await
    );
    transactional_store_suite!(
        ignore = "needs a server: ./tests/run postgres",
        scene().await
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: ./tests/run postgres"]
async fn every_message_takes_effect_once_in_a_storm() {
    let faulty = Faulty::new().await;
    let work = Work::of(&faulty.scene, 1_500)
        .config(faulty.config())
        .connections(4)
        .duplicates(150)
        .lease(4)
        .opened()
        .await;
    let storm = async {
        let seed = std::env::var("ONLYONCE_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        println!("to replay this storm: ONLYONCE_SEED={seed}");
        Storm::new(seed)
            .rage(
                &faulty.proxy,
                Duration::from_secs(8),
                Duration::from_millis(1_500),
            )
            .await;
        faulty.proxy.heal();
    };
    let (done, ()) = tokio::join!(work.run(write_effect), storm);
    let mut once = done.effects.clone();
    once.dedup();
    assert_eq!(once.len(), done.effects.len(), "an effect is there twice");
    assert_eq!(done.effects.len(), 1_500, "{:?}", done.report);
    assert!(done.set_aside.is_empty(), "{:?}", done.reasons);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: ./tests/run postgres"]
async fn a_commit_whose_answer_is_lost_is_asked_for_and_not_repeated() {
    use onlyonce_testkit::proxy::End;
    let faulty = Faulty::new().await;
    let work = Work::of(&faulty.scene, 600)
        .config(faulty.config())
        .connections(2)
        .lease(4)
        .opened()
        .await;
    let cuts = async {
        for _ in 0..25 {
            tokio::time::sleep(Duration::from_millis(60)).await;
            faulty.proxy.cut(End::Reset).await;
        }
    };
    let (done, ()) = tokio::join!(work.run(write_effect), cuts);
    let mut once = done.effects.clone();
    once.dedup();
    assert_eq!(
        (once.len(), done.effects.len()),
        (600, 600),
        "{:?}",
        done.report
    );
    assert_eq!(
        done.report.failed, 0,
        "an unknown commit is no failure of a message"
    );
}
