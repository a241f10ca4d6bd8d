//! The calls of a worker that carry KV, with the payload of each frame going to the connection as it is. A codec must copy a
//! message into its buffer, which at the rates of a handoff is the sender's largest cost after the kernel's own copy. On the
//! wire it is the same gRPC: any client reads it.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use http_body::{Body as HttpBody, Frame as BodyFrame};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tonic::body::Body;
use tonic::codec::Streaming;
use tonic::metadata::GRPC_CONTENT_TYPE;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tower_service::Service;

use crate::cluster::transfer_frame::Frame;
use crate::cluster::worker_server::{Worker, WorkerServer};
use crate::cluster::{KvFrame, TransferFrame};
use crate::link::MAX_MESSAGE_BYTES;

/// Field of [`TransferFrame`] that holds a [`KvFrame`].
const KV_FIELD: u32 = 3;
/// Field of [`KvFrame`] that holds the payload.
const DATA_FIELD: u32 = 5;
/// Before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// A worker's service. Calls whose answers carry KV are answered here, all others by the generated server.
#[derive(Debug)]
pub struct RawFrames<W> {
    worker: Arc<W>,
    others: WorkerServer<W>,
}

impl<W> Clone for RawFrames<W> {
    fn clone(&self) -> Self {
        RawFrames {
            worker: Arc::clone(&self.worker),
            others: self.others.clone(),
        }
    }
}

impl<W: Worker> RawFrames<W> {
    /// Serves `worker`; messages may have [`MAX_MESSAGE_BYTES`].
    pub fn new(worker: W) -> RawFrames<W> {
        let worker = Arc::new(worker);
        let others = WorkerServer::from_arc(Arc::clone(&worker))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        RawFrames { worker, others }
    }
}

impl<W: Worker> NamedService for RawFrames<W> {
    const NAME: &'static str = <WorkerServer<W> as NamedService>::NAME;
}

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

impl<W: Worker> Service<http::Request<Body>> for RawFrames<W> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        let worker = Arc::clone(&self.worker);
        let path = request.uri().path();
        let method = path.strip_prefix('/').and_then(|path| path.strip_prefix(Self::NAME));
        match method {
            Some("/Prefill") => Box::pin(async move {
                let answered = async { worker.prefill(message(request).await?).await };
                Ok(response(answered.await))
            }),
            Some("/Migrate") => Box::pin(async move {
                let answered = async { worker.migrate(message(request).await?).await };
                Ok(response(answered.await))
            }),
            _ => self.others.call(request),
        }
    }
}

/// The one message of a request.
async fn message<M: Message + Default + 'static>(request: http::Request<Body>) -> Result<Request<M>, Status> {
    let (parts, body) = request.into_parts();
    if parts.headers.contains_key("grpc-encoding") {
        return Err(Status::unimplemented("grpc-encoding: compression is not supported"));
    }
    let decoder = tonic_prost::ProstDecoder::<M>::default();
    let mut messages = Streaming::new_request(decoder, body, None, Some(MAX_MESSAGE_BYTES));
    let message = messages.message().await?;
    let message = message.ok_or_else(|| Status::internal("the request has no message"))?;
    let parts = http::Request::from_parts(parts, message);
    Ok(Request::from_parts(
        tonic::metadata::MetadataMap::from_headers(parts.headers().clone()),
        parts.extensions().clone(),
        parts.into_body(),
    ))
}

fn response<S>(answered: Result<Response<S>, Status>) -> http::Response<Body>
where
    S: Stream<Item = Result<TransferFrame, Status>> + Send + 'static,
{
    match answered {
        Ok(response) => {
            let (metadata, frames, extensions) = response.into_parts();
            let mut response = http::Response::new(Body::new(FrameBody {
                frames: Box::pin(frames),
                payload: None,
                is_over: false,
            }));
            *response.headers_mut() = metadata.into_headers();
            *response.extensions_mut() = extensions;
            response
                .headers_mut()
                .insert(http::header::CONTENT_TYPE, GRPC_CONTENT_TYPE);
            response
        }
        Err(status) => status.into_http(),
    }
}

/// Frames as the body of an answer: each message's beginning, then, untouched, the payload it ends with.
struct FrameBody<S> {
    frames: Pin<Box<S>>,
    /// Of the message whose beginning went last.
    payload: Option<Bytes>,
    is_over: bool,
}

impl<S> FrameBody<S> {
    fn end(&mut self, status: &Status) -> Result<BodyFrame<Bytes>, Status> {
        self.is_over = true;
        let mut trailers = http::HeaderMap::new();
        status.add_header(&mut trailers)?;
        Ok(BodyFrame::trailers(trailers))
    }
}

impl<S: Stream<Item = Result<TransferFrame, Status>> + Send> HttpBody for FrameBody<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        if let Some(payload) = self.payload.take() {
            return Poll::Ready(Some(Ok(BodyFrame::data(payload))));
        }
        if self.is_over {
            return Poll::Ready(None);
        }
        let Poll::Ready(frame) = self.frames.as_mut().poll_next(context) else {
            return Poll::Pending;
        };
        let frame = match frame.transpose() {
            Ok(None) => self.end(&Status::ok("")),
            Err(status) => self.end(&status),
            Ok(Some(frame)) => match encode(frame) {
                Ok((beginning, payload)) => {
                    self.payload = Some(payload).filter(|payload| !payload.is_empty());
                    Ok(BodyFrame::data(beginning))
                }
                Err(status) => self.end(&status),
            },
        };
        Poll::Ready(Some(frame))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}

/// A message with its prefix, in two pieces that follow each other.
fn encode(mut frame: TransferFrame) -> Result<(Bytes, Bytes), Status> {
    let payload = match &mut frame.frame {
        Some(Frame::Kv(kv)) => std::mem::take(&mut kv.data),
        _ => Bytes::new(),
    };
    let (beginning, n_bytes) = match &frame.frame {
        Some(Frame::Kv(kv)) if !payload.is_empty() => {
            let beginning = kv_beginning(kv, payload.len());
            let n_bytes = beginning.len() - PREFIX_BYTES + payload.len();
            (beginning, n_bytes)
        }
        _ => {
            let mut whole = with_prefix(frame.encoded_len());
            // Its buffer grows as needed.
            frame
                .encode(&mut whole)
                .map_err(|error| Status::internal(error.to_string()))?;
            let n_bytes = whole.len() - PREFIX_BYTES;
            (whole, n_bytes)
        }
    };
    if n_bytes > MAX_MESSAGE_BYTES {
        let message = format!("a frame has {n_bytes} bytes, expected at most {MAX_MESSAGE_BYTES}");
        return Err(Status::out_of_range(message));
    }
    let mut beginning = beginning;
    // No more than MAX_MESSAGE_BYTES.
    beginning[1..PREFIX_BYTES].copy_from_slice(&(n_bytes as u32).to_be_bytes());
    Ok((beginning.freeze(), payload))
}

/// Of a message of up to `capacity` bytes; the length is still missing.
fn with_prefix(capacity: usize) -> BytesMut {
    let mut buffer = BytesMut::with_capacity(PREFIX_BYTES + capacity);
    buffer.put_bytes(0, PREFIX_BYTES);
    buffer
}

/// Everything of a frame before its payload, which becomes the last of its fields: their order is free.
fn kv_beginning(kv: &KvFrame, n_payload_bytes: usize) -> BytesMut {
    let n_other_bytes = kv.encoded_len();
    let n_kv_bytes = n_other_bytes + key_len(DATA_FIELD) + encoded_len_varint(n_payload_bytes as u64) + n_payload_bytes;
    let n_key_bytes = key_len(KV_FIELD) + encoded_len_varint(n_kv_bytes as u64);
    let mut beginning = with_prefix(n_key_bytes + n_kv_bytes - n_payload_bytes);
    encode_key(KV_FIELD, WireType::LengthDelimited, &mut beginning);
    encode_varint(n_kv_bytes as u64, &mut beginning);
    kv.encode_raw(&mut beginning);
    encode_key(DATA_FIELD, WireType::LengthDelimited, &mut beginning);
    encode_varint(n_payload_bytes as u64, &mut beginning);
    beginning
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::{Accepted, Progress, StagedKv};

    /// What any receiver reads.
    fn decoded(frame: TransferFrame) -> TransferFrame {
        let (beginning, payload) = encode(frame).unwrap();
        let message = [&beginning[PREFIX_BYTES..], &payload[..]].concat();
        assert_eq!(beginning[0], 0, "not compressed");
        assert_eq!(beginning[1..PREFIX_BYTES], (message.len() as u32).to_be_bytes());
        TransferFrame::decode(&message[..]).unwrap()
    }

    proptest! {
        #[test]
        fn a_frame_reads_as_it_was_said(
            (transfer_id, ticket) in any::<(u64, u64)>(),
            (layer, first_block, n_blocks, choice) in any::<(u32, u32, u32, u32)>(),
            data in proptest::collection::vec(any::<u8>(), 0..3000),
            checksum in any::<Option<u64>>(),
            source_blocks in proptest::collection::vec(any::<u32>(), 0..20),
            staged in any::<Option<(u32, u32)>>(),
        ) {
            let kv = KvFrame {
                transfer_id, layer, first_block, n_blocks, data: data.into(), choice, checksum,
                generations: source_blocks.clone(), source_blocks, ticket,
                staged: staged.map(|(slot, generation)| StagedKv { slot, generation }),
            };
            let frame = TransferFrame { frame: Some(Frame::Kv(kv)) };
            prop_assert_eq!(decoded(frame.clone()), frame);
        }
    }

    #[test]
    fn the_payload_is_not_copied() {
        let data = Bytes::from(vec![7; 1 << 20]);
        let kv = KvFrame {
            data: data.clone(),
            ..KvFrame::default()
        };
        let (beginning, payload) = encode(TransferFrame {
            frame: Some(Frame::Kv(kv)),
        })
        .unwrap();
        assert_eq!(payload.as_ptr(), data.as_ptr());
        assert!(beginning.len() < 100);
    }

    #[test]
    fn other_frames_go_whole() {
        for frame in [
            Frame::Accepted(Accepted {
                transport: "grpc".into(),
                ..Accepted::default()
            }),
            Frame::Progress(Progress { n_steps: 9 }),
            Frame::Kv(KvFrame::default()),
        ] {
            let frame = TransferFrame { frame: Some(frame) };
            assert_eq!(decoded(frame.clone()), frame);
        }
    }

    #[test]
    fn a_frame_beyond_the_limit_is_refused() {
        let kv = KvFrame {
            data: vec![0; MAX_MESSAGE_BYTES].into(),
            ..KvFrame::default()
        };
        let error = encode(TransferFrame {
            frame: Some(Frame::Kv(kv)),
        })
        .unwrap_err();
        assert_eq!(error.code(), tonic::Code::OutOfRange);
    }
}
