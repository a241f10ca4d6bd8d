//! The operator's questions to a running cluster, and how answers are printed. Changes nothing in the cluster.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use baton_proto::cluster::operator_client::OperatorClient;
use baton_proto::cluster::{InstanceStatus, ListInstancesRequest};
use baton_proto::link::{ClusterSecret, LinkOptions};
use serde::Serialize;
use tonic::metadata::{Ascii, MetadataValue};

use crate::announce;
use crate::config::{Address, Secret};

/// Whom to ask, and how.
#[derive(Clone, Debug)]
pub struct CtlConfig {
    /// The scheduler process.
    pub server: Address,
    /// Print JSON rather than a table.
    pub json: bool,
    /// Give up after this long.
    pub timeout: Duration,
    /// Shown as a bearer token.
    pub api_key: Option<Secret>,
    /// Shown as a process of the cluster.
    pub cluster_secret: Option<Secret>,
}

/// One instance, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InstanceRow {
    /// Its name.
    pub id: String,
    /// What it is used for.
    pub role: String,
    /// Where it is reached.
    pub address: String,
    /// Process id on its machine.
    pub pid: u32,
    /// Which life of the instance, 16 hexadecimal digits.
    pub incarnation: String,
    /// The model it serves.
    pub model: String,
    /// Whether it makes steps when it has work.
    pub healthy: bool,
    /// Sequences in its batches.
    pub n_running: u32,
    /// Sequences that wait there.
    pub n_waiting: u32,
    /// Blocks neither held nor cached.
    pub n_blocks_free: u32,
    /// Blocks that only the prefix cache holds.
    pub n_blocks_cached: u32,
    /// Blocks it has.
    pub n_blocks_total: u32,
    /// Steps made.
    pub n_steps: u64,
    /// Seconds since it joined.
    pub up_seconds: u64,
    /// Whether its ledger of blocks is whole.
    pub ledger_whole: bool,
    /// Device kind, instruction set and dtypes.
    pub numerics_class: String,
}

impl From<InstanceStatus> for InstanceRow {
    fn from(status: InstanceStatus) -> InstanceRow {
        let join = status.join.unwrap_or_default();
        let load = status.load.unwrap_or_default();
        InstanceRow {
            id: join.instance_id,
            role: join.role,
            address: join.address,
            pid: join.pid,
            incarnation: format!("{:016x}", join.incarnation),
            model: join.model,
            healthy: load.healthy,
            n_running: load.n_running,
            n_waiting: load.n_waiting,
            n_blocks_free: load.n_blocks_free,
            n_blocks_cached: load.n_blocks_cached,
            n_blocks_total: join.n_blocks_total,
            n_steps: load.n_steps,
            up_seconds: status.joined_seconds_ago,
            ledger_whole: load.ledger_whole,
            numerics_class: join.numerics_class,
        }
    }
}

/// `baton ctl instances`.
pub async fn instances(config: &CtlConfig) -> anyhow::Result<()> {
    let rows = list(config).await?;
    let text = if config.json {
        serde_json::to_string_pretty(&rows)?
    } else {
        table(&rows)
    };
    announce::print(text.trim_end());
    Ok(())
}

async fn list(config: &CtlConfig) -> anyhow::Result<Vec<InstanceRow>> {
    let secret = config
        .cluster_secret
        .as_ref()
        .map(|secret| ClusterSecret::new(secret.expose()))
        .transpose()?;
    let link = LinkOptions {
        connect_timeout: config.timeout,
        secret,
        ..LinkOptions::default()
    };
    let channel = link.channel(&config.server.to_string())?;
    let mut client = OperatorClient::with_interceptor(channel, link.present_secret());
    let mut request = tonic::Request::new(ListInstancesRequest {});
    if let Some(key) = &config.api_key {
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.expose()).parse()?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
    let within = tokio::time::timeout(config.timeout, client.list_instances(request)).await;
    let answer = match within {
        Err(_) => Err(anyhow::anyhow!("no answer within {:?}", config.timeout)),
        // A connection that failed says why only in its innermost cause.
        Ok(Err(status)) => match anyhow::Chain::new(&status).skip(1).last() {
            Some(cause) => Err(anyhow::anyhow!("{:?}: {cause}", status.code())),
            None => Err(anyhow::anyhow!("{:?}: {}", status.code(), status.message())),
        },
        Ok(Ok(response)) => Ok(response.into_inner()),
    };
    let response = answer.with_context(|| format!("scheduler at {}", config.server))?;
    let mut rows: Vec<InstanceRow> = response.instances.into_iter().map(InstanceRow::from).collect();
    rows.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(rows)
}

fn table(rows: &[InstanceRow]) -> String {
    let header = [
        "INSTANCE",
        "ROLE",
        "STATE",
        "RUNNING",
        "WAITING",
        "BLOCKS USED",
        "STEPS",
        "UP",
        "PID",
        "ADDRESS",
    ];
    let mut cells = vec![header.map(str::to_owned)];
    cells.extend(rows.iter().map(|row| {
        let state = match (row.healthy, row.ledger_whole) {
            (false, _) => "stuck",
            (true, false) => "leaking",
            (true, true) => "ok",
        };
        let n_used = row
            .n_blocks_total
            .saturating_sub(row.n_blocks_free)
            .saturating_sub(row.n_blocks_cached);
        [
            row.id.clone(),
            row.role.clone(),
            state.to_owned(),
            row.n_running.to_string(),
            row.n_waiting.to_string(),
            format!("{n_used}/{}", row.n_blocks_total),
            row.n_steps.to_string(),
            format!("{}s", row.up_seconds),
            row.pid.to_string(),
            row.address.clone(),
        ]
    }));
    let width = |column: usize| cells.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for line in &cells {
        let mut padded = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(padded, "{cell:<width$}  ");
        }
        let _ = writeln!(text, "{}", padded.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use baton_proto::cluster::operator_server::{Operator, OperatorServer};
    use baton_proto::cluster::{ListInstancesResponse, WorkerJoin, WorkerLoad};
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status};

    use super::*;
    use crate::config::Setting as _;

    struct FakeOperator;

    #[tonic::async_trait]
    impl Operator for FakeOperator {
        async fn list_instances(
            &self,
            _: Request<ListInstancesRequest>,
        ) -> Result<Response<ListInstancesResponse>, Status> {
            let instance = |id: &str, role: &str, n_running| InstanceStatus {
                join: Some(WorkerJoin {
                    instance_id: id.into(),
                    role: role.into(),
                    address: "unix:/run/x.sock".into(),
                    incarnation: 0xab,
                    n_blocks_total: 100,
                    pid: 7,
                    ..WorkerJoin::default()
                }),
                load: Some(WorkerLoad {
                    n_running,
                    n_blocks_free: 60,
                    n_blocks_cached: 30,
                    healthy: true,
                    ledger_whole: true,
                    ..WorkerLoad::default()
                }),
                joined_seconds_ago: 12,
            };
            let instances = vec![instance("prefill-0", "prefill", 0), instance("decode-0", "decode", 3)];
            Ok(Response::new(ListInstancesResponse { instances }))
        }
    }

    async fn operator() -> Address {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = Address::parse(&listener.local_addr().expect("bound").to_string()).expect("an address");
        let secret = Some(ClusterSecret::new("s3cret").expect("printable"));
        let guard = LinkOptions {
            secret,
            ..LinkOptions::default()
        }
        .require_secret();
        let service = OperatorServer::with_interceptor(FakeOperator, guard);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    fn config(server: Address, secret: Option<&str>) -> CtlConfig {
        let cluster_secret = secret.and_then(Secret::parse);
        CtlConfig {
            server,
            json: false,
            timeout: Duration::from_secs(20),
            api_key: None,
            cluster_secret,
        }
    }

    #[tokio::test]
    async fn instances_are_listed_by_name() {
        let rows = list(&config(operator().await, Some("s3cret")))
            .await
            .expect("an answer");
        assert_eq!(
            rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(),
            ["decode-0", "prefill-0"]
        );
        assert_eq!((rows[0].n_running, rows[0].up_seconds), (3, 12));
        assert_eq!(rows[0].incarnation, "00000000000000ab");
        let table = table(&rows);
        let line = table.lines().nth(1).expect("two lines");
        let cells: Vec<_> = line.split_whitespace().collect();
        assert_eq!(
            cells,
            [
                "decode-0",
                "decode",
                "ok",
                "3",
                "0",
                "10/100",
                "0",
                "12s",
                "7",
                "unix:/run/x.sock"
            ]
        );
    }

    #[tokio::test]
    async fn refusals_and_silence_are_one_line_with_the_address() {
        let server = operator().await;
        let message = format!("{:#}", list(&config(server.clone(), None)).await.expect_err("refused"));
        assert!(
            message.starts_with(&format!("scheduler at {server}: ")) && message.contains("secret"),
            "{message}"
        );

        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let closed = Address::parse(&listener.local_addr().expect("bound").to_string()).expect("an address");
        drop(listener);
        let message = format!(
            "{:#}",
            list(&config(closed.clone(), None)).await.expect_err("nobody there")
        );
        assert!(message.starts_with(&format!("scheduler at {closed}: ")), "{message}");
    }
}
