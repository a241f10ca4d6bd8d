//! A cache of the card that another process reads in place: what it copies, what it must not use, and what happens when the
//! owner dies. The owner is this test's own program, started again.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use baton_kernels::cuda::{CardUuid, Cuda, CudaMemoryHandle, CudaMode};
use baton_kernels::{DType, ForeignKv, KernelError, KvCache, KvRead, KvShare, KvWrite};

use crate::support::{LAYOUT, device};

const N_BLOCKS: usize = 6;
/// Of all blocks at first.
const GENERATION: u32 = 3;

const OWNER: &str = "BATON_IPC_OWNER";

fn cuda() -> Option<Cuda> {
    device(DType::F32, CudaMode::Fast, LAYOUT.head_dim)
}

/// K and V of one layer of a block.
fn bytes(layer: usize, block: u32, generation: u32) -> [Vec<u8>; 2] {
    [1, 2].map(|part| {
        let seed = 7 * layer + 31 * block as usize + 101 * generation as usize + part;
        (0..LAYOUT.part_bytes()).map(|i| (i * seed) as u8).collect()
    })
}

fn fill(kv: &mut KvCache, block: u32, generation: u32) {
    kv.set_generation(block, generation);
    let mut writer = kv.write_handle(block).unwrap();
    for layer in 0..LAYOUT.n_layers {
        let [key, value] = bytes(layer, block, generation);
        writer.write(layer, &key, &value).unwrap();
    }
}

/// The owner's program: fills its cache, names it on its output, and gives away a block for each line of its input.
fn own() {
    let cuda = cuda().unwrap();
    let mut kv = cuda.kv_cache(LAYOUT, N_BLOCKS).unwrap();
    (0..N_BLOCKS as u32).for_each(|block| fill(&mut kv, block, GENERATION));
    let share = kv.share().expect("memory that can be shared");
    let handle = share.card().unwrap();
    let words = [handle.card.0.as_slice(), &handle.bytes].concat();
    let words: Vec<String> = words.iter().map(u8::to_string).collect();
    println!(
        "\nOWNS {} {} {}",
        share.as_fd().as_raw_fd(),
        words.join(" "),
        handle.offset
    );
    for line in std::io::stdin().lines() {
        fill(&mut kv, line.unwrap().parse().unwrap(), GENERATION + 1);
        println!("\nGAVE");
    }
}

struct Owner {
    process: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Owner {
    fn start(test: &str) -> Owner {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(OWNER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Owner {
            commands: process.stdin.take().unwrap(),
            answers: BufReader::new(process.stdout.take().unwrap()).lines(),
            process,
        }
    }

    fn answer(&mut self, word: &str) -> Vec<u64> {
        let is_meant = |line: &String| line.starts_with(word);
        let line = self.answers.by_ref().map(Result::unwrap).find(is_meant);
        let line = line.expect("the owner answers");
        line.split(' ').skip(1).map(|number| number.parse().unwrap()).collect()
    }

    /// The file with the generations, and the memory's name.
    fn named(&mut self) -> (OwnedFd, CudaMemoryHandle) {
        let numbers = self.answer("OWNS");
        let path = format!("/proc/{}/fd/{}", self.process.id(), numbers[0]);
        let (card, bytes) = numbers[1..].split_at(16);
        let handle = CudaMemoryHandle {
            card: CardUuid(std::array::from_fn(|i| card[i] as u8)),
            bytes: std::array::from_fn(|i| bytes[i] as u8),
            offset: bytes[64],
        };
        (std::fs::File::open(path).unwrap().into(), handle)
    }

    fn give_away(&mut self, block: u32) {
        writeln!(self.commands, "{block}").unwrap();
        self.answer("GAVE");
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.kill();
    }
}

fn open(owner: &(OwnedFd, CudaMemoryHandle), near: &KvShare) -> Result<ForeignKv, KernelError> {
    ForeignKv::map_on_card(&owner.0, LAYOUT, N_BLOCKS, &owner.1, near)
}

/// Copies one layer of blocks of `from`, as they are meant to be, to our first ones; what those hold then.
fn copy(from: &ForeignKv, kv: &mut KvCache, layer: usize, blocks: &[u32]) -> Result<Vec<u8>, KernelError> {
    let ours: Vec<u32> = (0..blocks.len() as u32).collect();
    let mut writers: Vec<KvWrite> = kv.reserve_write(&ours).unwrap();
    let meant: Vec<(u32, u32)> = blocks.iter().map(|&block| (block, GENERATION)).collect();
    from.copy(layer, &meant, &mut writers)?;
    drop(writers);
    let reads: Vec<KvRead> = ours.iter().map(|&block| kv.pin(layer, block)).collect();
    Ok(KvRead::gather(&reads).as_ref().to_vec())
}

fn expected(layer: usize, blocks: &[u32]) -> Vec<u8> {
    let part = |part: usize| {
        blocks
            .iter()
            .flat_map(move |&block| bytes(layer, block, GENERATION)[part].clone())
    };
    part(0).chain(part(1)).collect()
}

#[test]
fn another_process_reads_blocks_where_they_are() {
    if std::env::var_os(OWNER).is_some() {
        return own();
    }
    let Some(cuda) = cuda() else { return };
    let mut owner = Owner::start("ipc::another_process_reads_blocks_where_they_are");
    let named = owner.named();
    let mut kv = cuda.kv_cache(LAYOUT, 4).unwrap();
    let near = kv.share().unwrap();
    let theirs = open(&named, &near).unwrap();
    assert!(theirs.is_on_card());
    for (layer, blocks) in [(1, [4, 0, 2].as_slice()), (0, &[5])] {
        assert_eq!(copy(&theirs, &mut kv, layer, blocks).unwrap(), expected(layer, blocks));
    }
    // A block that the owner has given to another is not what was meant.
    owner.give_away(2);
    let stale = copy(&theirs, &mut kv, 0, &[0, 2]).unwrap_err();
    assert!(matches!(stale, KernelError::Stale { block: 2, found, .. } if found == GENERATION + 1));
    // Once the owner has died, what is mapped stays readable, and nothing more can be mapped.
    owner.kill();
    assert_eq!(copy(&theirs, &mut kv, 1, &[3, 1]).unwrap(), expected(1, &[3, 1]));
    drop(theirs);
    assert!(open(&named, &near).is_err());
}

#[test]
fn memory_of_another_card_and_our_own_are_refused() {
    let Some(cuda) = cuda() else { return };
    let kv = cuda.kv_cache(LAYOUT, 4).unwrap();
    let near = kv.share().unwrap();
    let here = near.card().unwrap().clone();
    let elsewhere = CudaMemoryHandle {
        card: CardUuid(std::array::from_fn(|i| i as u8)),
        ..here.clone()
    };
    let file = near.as_fd().try_clone_to_owned().unwrap();
    let refused = |handle: &CudaMemoryHandle| {
        let opened = ForeignKv::map_on_card(&file, LAYOUT, 4, handle, &near);
        opened.err().expect("refused").to_string()
    };
    assert_eq!(
        refused(&elsewhere),
        format!(
            "device cuda: its memory is on card GPU-00010203-0405-0607-0809-0a0b0c0d0e0f, ours is {}",
            here.card
        )
    );
    assert!(refused(&here).starts_with("device cuda: cannot map device memory of another process: "));
    let on_host = KvCache::shared(LAYOUT, 4).unwrap().share().unwrap();
    let refused = ForeignKv::map_on_card(&file, LAYOUT, 4, &here, &on_host);
    assert!(
        refused
            .err()
            .expect("refused")
            .to_string()
            .ends_with("ours is on the host")
    );
}
