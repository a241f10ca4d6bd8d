//! A cache of the card that another process reads in place, of its own card or of another; and blocks of it that another
//! process reads from the host's memory on their way out. What it copies, what it must not use, and what happens when the
//! owner dies. The owner is this test's own program, started again.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use baton_kernels::cuda::{CardUuid, Cuda, CudaMemoryHandle, CudaMode};
use baton_kernels::{
    DType, ForeignKv, ForeignStaging, KernelError, KvBytes, KvCache, KvRead, KvShare, KvWrite, StagedPlace,
    StagingGeometry,
};
use cudarc::driver::CudaContext;

use crate::controls::set;
use crate::stand_in::{self, Driver};
use crate::support::{LAYOUT, device, options};

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

/// A card beside the first: the stand-in has one when asked; `None`, with a word, where the machine has not.
fn second_card() -> Option<Cuda> {
    let _first = cuda()?;
    if let Driver::StandIn(_) = stand_in::driver()? {
        set(c"n_devices", 2);
    }
    if CudaContext::device_count().unwrap() < 2 {
        eprintln!("SKIPPED: no second card");
        return None;
    }
    let options = options(1, DType::F32, CudaMode::Fast, LAYOUT.head_dim)?;
    Some(Cuda::new(options).unwrap())
}

/// The owner's program: fills its cache, names it on its output, and does what each line of its input says.
fn own(cuda: &Cuda) {
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
    let staging = share.staging().expect("host memory that can be shared");
    let geometry = staging.geometry;
    println!(
        "\nSTAGES_IN {} {} {}",
        staging.file.as_raw_fd(),
        geometry.n_slots(),
        geometry.slot_bytes()
    );
    let mut staged: Vec<KvBytes> = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (command, numbers) = line.split_once(' ').unwrap();
        let numbers: Vec<u32> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
        match command {
            "give" => {
                fill(&mut kv, numbers[0], GENERATION + 1);
                println!("\nGAVE");
            }
            "stage" => {
                let reads: Vec<KvRead> = numbers[1..]
                    .iter()
                    .map(|&block| kv.pin(numbers[0] as usize, block))
                    .collect();
                let bytes = KvRead::gather(&reads);
                // Where there is room no longer, the bytes are ours alone.
                match bytes.place() {
                    Some(StagedPlace { slot, generation }) => println!("\nSTAGED {slot} {generation}"),
                    None => println!("\nSTAGED"),
                }
                staged.push(bytes);
            }
            "forget" => {
                staged.clear();
                println!("\nFORGOT");
            }
            other => panic!("{other}"),
        }
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

    /// The memory through which blocks leave.
    fn staging(&mut self) -> ForeignStaging {
        let numbers = self.answer("STAGES_IN");
        let path = format!("/proc/{}/fd/{}", self.process.id(), numbers[0]);
        let geometry = StagingGeometry::new(numbers[1] as u32, numbers[2] as usize).unwrap();
        let file = std::fs::File::open(path).unwrap().into();
        ForeignStaging::map(&file, LAYOUT, geometry).unwrap()
    }

    fn give_away(&mut self, block: u32) {
        writeln!(self.commands, "give {block}").unwrap();
        self.answer("GAVE");
    }

    /// Has blocks of a layer copied to where we can read them; `None` where all room is taken.
    fn stage(&mut self, layer: usize, blocks: &[u32]) -> Option<StagedPlace> {
        let blocks: Vec<String> = blocks.iter().map(u32::to_string).collect();
        writeln!(self.commands, "stage {layer} {}", blocks.join(" ")).unwrap();
        match *self.answer("STAGED") {
            [slot, generation] => Some(StagedPlace {
                slot: slot as u32,
                generation: generation as u32,
            }),
            _ => None,
        }
    }

    /// Has it give up everything staged.
    fn forget(&mut self) {
        writeln!(self.commands, "forget 0").unwrap();
        self.answer("FORGOT");
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
    let meant: Vec<(u32, u32)> = blocks.iter().map(|&block| (block, GENERATION)).collect();
    arrived(kv, layer, blocks.len(), |writers| from.copy(layer, &meant, writers))
}

/// What our first blocks hold of a layer after `copy` has written them.
fn arrived(
    kv: &mut KvCache,
    layer: usize,
    n_blocks: usize,
    copy: impl FnOnce(&mut [KvWrite]) -> Result<(), KernelError>,
) -> Result<Vec<u8>, KernelError> {
    let ours: Vec<u32> = (0..n_blocks as u32).collect();
    let mut writers: Vec<KvWrite> = kv.reserve_write(&ours).unwrap();
    copy(&mut writers)?;
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
        return own(&cuda().unwrap());
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
fn blocks_of_another_card_are_read_where_this_one_reaches_it() {
    if std::env::var_os(OWNER).is_some() {
        return own(&second_card().unwrap());
    }
    let Some(cuda) = cuda() else { return };
    if second_card().is_none() {
        return;
    }
    let mut owner = Owner::start("ipc::blocks_of_another_card_are_read_where_this_one_reaches_it");
    let named = owner.named();
    let mut kv = cuda.kv_cache(LAYOUT, 4).unwrap();
    let near = kv.share().unwrap();
    assert_ne!(named.1.card, near.card().unwrap().card);
    let theirs = open(&named, &near);
    let Driver::StandIn(_) = stand_in::driver().unwrap() else {
        // Two cards of a machine need not reach each other.
        if let Ok(theirs) = theirs {
            assert_eq!(copy(&theirs, &mut kv, 1, &[4, 0]).unwrap(), expected(1, &[4, 0]));
        }
        return;
    };
    assert_eq!(
        copy(&theirs.unwrap(), &mut kv, 1, &[4, 0]).unwrap(),
        expected(1, &[4, 0])
    );
    set(c"peer_access", 0);
    let refused = open(&named, &near).err().expect("refused").to_string();
    set(c"peer_access", 1);
    assert!(
        refused.ends_with("the driver gives one no access to the other's memory"),
        "{refused}"
    );
}

#[test]
fn another_process_reads_blocks_on_their_way_out() {
    if std::env::var_os(OWNER).is_some() {
        return own(&cuda().unwrap());
    }
    let Some(cuda) = cuda() else { return };
    let mut owner = Owner::start("ipc::another_process_reads_blocks_on_their_way_out");
    let theirs = owner.staging();
    let on_card = cuda.kv_cache(LAYOUT, 4).unwrap();
    let on_host = KvCache::new(LAYOUT, 4).unwrap();
    for mut kv in [on_card, on_host] {
        for (layer, blocks) in [(1, [4, 0, 2].as_slice()), (0, &[5])] {
            let place = owner.stage(layer, blocks).unwrap();
            let copied = arrived(&mut kv, layer, blocks.len(), |writers| {
                theirs.copy(place, layer, writers)
            });
            assert_eq!(copied.unwrap(), expected(layer, blocks));
        }
    }
    // Everything that is staged has a slot of its own; once they are all taken, blocks go another way.
    let places: Vec<StagedPlace> = std::iter::from_fn(|| owner.stage(0, &[1])).take(100).collect();
    assert!((1..100).contains(&places.len()));
    let mut kv = KvCache::new(LAYOUT, 4).unwrap();
    let mut copy = |place, n_blocks| arrived(&mut kv, 0, n_blocks, |writers| theirs.copy(place, 0, writers));
    for &place in &places {
        assert_eq!(copy(place, 1).unwrap(), expected(0, &[1]));
    }
    // A slot that holds something else is not what was meant; nor is one that there is not, or that cannot hold as much.
    owner.forget();
    for block in 0..N_BLOCKS as u32 {
        owner.stage(0, &[block]).unwrap();
    }
    let is_stale = |place: &&StagedPlace| matches!(copy(**place, 1), Err(KernelError::StaleSlot { .. }));
    assert!(places.iter().filter(is_stale).count() >= N_BLOCKS);
    let nowhere = StagedPlace {
        slot: 1000,
        ..places[0]
    };
    assert!(matches!(
        copy(nowhere, 1),
        Err(KernelError::NoSuchSlot { slot: 1000, .. })
    ));
}

#[test]
fn where_the_host_memory_cannot_be_shared_blocks_leave_in_our_own() {
    let Some(cuda) = cuda() else { return };
    let Driver::StandIn(_) = stand_in::driver().unwrap() else {
        return;
    };
    set(c"host_registration", 0);
    let kv = cuda.kv_cache(LAYOUT, 4);
    set(c"host_registration", 1);
    let mut kv = kv.unwrap();
    let share = kv.share().expect("the card's memory is shared all the same");
    assert!(share.staging().is_none());
    fill(&mut kv, 2, GENERATION);
    let bytes = KvRead::gather(&[kv.pin(1, 2)]);
    assert_eq!((bytes.as_ref(), bytes.place()), (&expected(1, &[2])[..], None));
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
            "device cuda: its memory is on card GPU-00010203-0405-0607-0809-0a0b0c0d0e0f, ours is {}: this process does \
             not see that card (CUDA_VISIBLE_DEVICES)",
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
