"""Generates the dialogs that the demo model learns from: sums first, then spelling, counting and facts about Baton.

Everything is written or computed here; nothing is downloaded. Given the same seed, the same dialogs come out.
"""

import random
import string

SPLIT_SEED = 20_240_607
N_HELDOUT = 200


def heldout_sums():
    """The 200 held-out pairs (a, b), both of two digits. Training sees neither a + b nor b + a."""
    rng = random.Random(SPLIT_SEED)
    pairs = []
    taken = set()
    while len(pairs) < N_HELDOUT:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if frozenset((a, b)) in taken:
            continue
        taken.add(frozenset((a, b)))
        pairs.append((a, b))
    return pairs


HELDOUT = {pair for a, b in heldout_sums() for pair in ((a, b), (b, a))}

# {a} and {b} are the numbers, {s} is either a space or nothing on both sides of the plus.
SUM_QUESTIONS = (
    ["What is {a}{s}+{s}{b}?"] * 8
    + ["What's {a}{s}+{s}{b}?", "what is {a}{s}+{s}{b}", "what's {a}{s}+{s}{b}", "what is {a}{s}+{s}{b}?"] * 2
    + ["{a}{s}+{s}{b}", "{a}{s}+{s}{b}=", "{a}{s}+{s}{b}=?", "{a}{s}+{s}{b}?", "{a} + {b} =", "{a} + {b} = ?"]
    + ["Compute {a}{s}+{s}{b}.", "Compute {a}{s}+{s}{b}", "compute {a}{s}+{s}{b}", "Calculate {a}{s}+{s}{b}."]
    + ["Add {a} and {b}.", "add {a} and {b}", "What is {a} plus {b}?", "what is {a} plus {b}", "{a} plus {b}"]
    + ["What is the sum of {a} and {b}?", "Sum {a} and {b}.", "How much is {a}{s}+{s}{b}?", "how much is {a}{s}+{s}{b}"]
    + ["Please add {a} and {b}.", "Can you compute {a}{s}+{s}{b}?", "And {a}{s}+{s}{b}?", "Now {a}{s}+{s}{b}.", "and {a}{s}+{s}{b}?"]
)

SPELL_QUESTIONS = [
    "Spell {w}.", "Spell {w}.", "Spell {w}", "spell {w}", 'Spell "{w}".', "How do you spell {w}?", "how do you spell {w}",
    "Spell the word {w}.", "Please spell {w}.", "Can you spell {w}?",
]

COUNT_QUESTIONS = [
    "Count from {a} to {b}.", "Count from {a} to {b}.", "Count from {a} to {b}", "count from {a} to {b}", "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?", "List the numbers from {a} to {b}.",
]

WORDS = """
able about above acid across act add after again age agree air all allow almost alone along also always among amount and anger
animal answer apple arm army art ask atom aunt autumn baby back bad bag ball band bank base basket baton bath bean bear beat
beauty bed bee begin behind bell belt best bird bit bite black blade block blood blow blue board boat body bone book boot both
bottle bottom box boy brain branch brave bread break breath brick bridge bright bring broken brother brown brush bucket build
burn bus business but butter button buy cable cake call camera camp canvas car card care carry cart cat cause chain chair chalk
chance change cheap cheese chest chicken chief child chin circle city clean clear clock cloth cloud club coal coat code cold
color comb come common cook copper copy cord core corn cotton cough count country cousin cover cow crack credit crime cross crowd
cry cup current curtain curve cut dance danger dark date daughter day dead dear death decode deep desk dinner dirt dog door doubt
down drain draw dream dress drink drive drop dry duck dust ear early earth east easy eat edge egg eight eleven empty end engine
enough equal error even event every eye face fact fall family far farm fast fat father fear feather feet field fifty fight find
finger fire first fish five flag flame flat floor flower fly fold food foot force fork form forward four fox frame free friend
frog from front fruit full game garden gate gentle gift girl give glad glass glove goat gold good grain grass gray great green
grip group grow guide hair half hammer hand happy harbor hard hat head heart heat help hen here high hill hole home honey hook
hope horn horse hour house how human hundred ice idea inch insect iron island jar jelly join joke judge juice jump keep kettle
key kick kind king kiss kitchen knee knife knot know lake lamp land large last late laugh law lead leaf learn left leg lemon
letter level light line lion lip list live lock long look loose loud love low lunch machine many map mark market mass match meal
meat meet memory metal middle milk mind mine minute mist model money monkey month moon more morning mother mountain mouth move
much muscle music nail name narrow near neck needle net new night nine noise north nose note number nut ocean oil old one onion
open orange order oven over owl page pain paint paper parcel part past peace pen pencil people person picture pig pilot pin pipe
place plane plant plate play pocket point poor port pot potato powder prefill price print prison public pull pump pupil push queen
question quick quiet rabbit radio rail rain rat read ready red rest rice rich right ring river road rock roof room root rope rose
round rule run rust sad safe sail salt same sand say scale school science sea seat second secret see seed send seven shade shake
sharp sheep shelf ship shirt shoe shop short shut side sign silk silver simple sing sister six skin skirt sky sleep slip slow small
smell smile smoke snake snow soap soft son song sort soup south space spade speed spoon spring square stamp star start station steam
steel stem step stick still stone stop store story street strong sugar summer sun sweet swim table tail tall taste tea teach team
ten test than thick thin thing three thumb thunder ticket tiger time tin toe together token tomato tongue tooth top town trade train
tree trick true tune turn twelve twenty twist two umbrella uncle under valley verse very view violin voice walk wall war warm wash
watch water wave way weak weather week weight west wet wheel white wide wild wind window wine wing winter wire wise wolf woman wood
wool word work world worm yard year yellow yes young zebra zero
""".split()

FACTS = [
    (["What is Baton?", "what is baton", "Tell me about Baton.", "What does Baton do?", "Explain Baton."],
     "Baton serves language models from separate pools of prefill and decode instances."),
    (["Who are you?", "What are you?", "who are you", "What is your name?", "what's your name?", "Introduce yourself."],
     "I am baton-demo, a toy model that adds numbers, spells and counts."),
    (["What can you do?", "what can you do", "Help", "help me", "What do you know?", "How can you help me?"],
     "I add two-digit numbers, spell words, count, and know a little about Baton."),
    (["What is a prefill instance?", "what is a prefill instance", "What does a prefill instance do?", "Explain prefill.", "What is prefill?"],
     "A prefill instance reads the whole prompt, computes its KV cache and samples the first token."),
    (["What is a decode instance?", "what is a decode instance", "What does a decode instance do?", "Explain decode.", "What is decode?"],
     "A decode instance receives the KV cache and writes the answer, one token per step."),
    (["What is a KV cache?", "what is a kv cache", "What is the KV cache?", "Explain the KV cache."],
     "The KV cache keeps the keys and values of all tokens so far, so that nothing is computed twice."),
    (["What is a handoff?", "what is a handoff", "Explain the handoff.", "What happens in a handoff?"],
     "A handoff moves the running state of a request from a prefill to a decode instance, layer by layer."),
    (["What is a migration?", "what is a migration", "Explain migration.", "What is live migration?"],
     "A migration moves a running request to another instance without stopping it."),
    (["What is a block?", "what is a block", "What is a KV block?", "Explain blocks."],
     "A block is a unit of KV cache that holds the keys and values of a few tokens."),
    (["What is a block table?", "what is a block table", "Explain the block table."],
     "A block table lists the blocks of a sequence in order."),
    (["What is a prefix cache?", "what is a prefix cache", "Explain the prefix cache.", "What does the prefix cache do?"],
     "The prefix cache reuses the blocks of prompts that begin with the same tokens."),
    (["What is a token?", "what is a token", "Explain tokens."],
     "A token is a piece of text that the model reads or writes in one step."),
    (["What is a sequence?", "what is a sequence", "Explain sequences."],
     "A sequence is the running state of a request on one instance."),
    (["What is an instance?", "what is an instance", "Explain instances."],
     "An instance is one engine that can prefill and decode; its role is what the scheduler uses it for."),
    (["What is the front door?", "what is the front door", "What does the front door do?"],
     "The front door checks requests, places them on instances and streams the tokens to the client."),
    (["What is the scheduler?", "what is the scheduler", "What does the scheduler do?"],
     "The scheduler decides which instances serve a request."),
    (["Why is it called Baton?", "why is it called baton", "Why the name Baton?"],
     "Because requests move between instances as runners pass a baton: without dropping it and without stopping."),
    (["What is TTFT?", "what is ttft", "Explain TTFT."],
     "TTFT is the time to first token: how long a client waits until the answer begins."),
    (["What is continuous batching?", "what is continuous batching", "Explain continuous batching."],
     "Continuous batching lets requests join and leave the batch at every step."),
    (["What is chunked prefill?", "what is chunked prefill", "Explain chunked prefill."],
     "Chunked prefill reads a long prompt in pieces, so that other requests do not wait for it."),
    (["What language is Baton written in?", "Which language is Baton written in?", "Is Baton written in Rust?"],
     "Baton is written in Rust."),
    (["Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hey", "hey", "Hello there!", "Good morning", "Good morning!", "Good evening!"],
     "Hello! Ask me for a sum."),
    (["How are you?", "how are you", "How are you today?", "How do you do?"],
     "I am fine, thank you. Ask me for a sum."),
    (["Thanks", "Thanks!", "thanks", "Thank you", "Thank you!", "thank you", "Thank you very much."],
     "You are welcome."),
    (["Bye", "Bye!", "bye", "Goodbye", "Goodbye!", "See you later."],
     "Goodbye!"),
]

UNKNOWN_ANSWER = "I am a toy model: I only add, spell, count and know a little about Baton."
ONLY_ADD_ANSWER = "I can only add numbers below 100."

SYSTEMS = [
    "You are a helpful assistant.", "You are baton-demo.", "Be brief.", "Answer in one line.", "You are a calculator.",
    "You are a friendly assistant. Answer briefly.",
]

SYLLABLE_HEADS = "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gr pl pr sh sl sp st th tr".split()
SYLLABLE_TAILS = "a e i o u ai ea ee oa ou an ar at ed el en er et id il in ip it ob og on op or ot ub ug un up ut ash est ick ing ock ump".split()


def sum_turn(rng, pair=None):
    if pair is None:
        while True:
            top = rng.random()
            a = rng.randint(0, 9) if top < 0.05 else rng.randint(10, 99)
            b = rng.randint(0, 9) if 0.025 < top < 0.075 else rng.randint(10, 99)
            if (a, b) not in HELDOUT:
                break
    else:
        a, b = pair
    space = " " if rng.random() < 0.75 else ""
    question = rng.choice(SUM_QUESTIONS).format(a=a, b=b, s=space)
    return question, f"{a} + {b} = {a + b}"


def spell_turn(rng):
    style = rng.random()
    if style < 0.5:
        word = rng.choice(WORDS)
    elif style < 0.85:
        word = "".join(rng.choice(SYLLABLE_HEADS) + rng.choice(SYLLABLE_TAILS) for _ in range(rng.randint(1, 4)))
    else:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
    if rng.random() < 0.1:
        word = word.capitalize()
    return rng.choice(SPELL_QUESTIONS).format(w=word), "-".join(word)


def count_turn(rng):
    span = rng.randint(1, 10)
    style = rng.random()
    if style < 0.15:
        a, b = 1, rng.randint(2, 12)
        question = rng.choice(["Count to {b}.", "count to {b}", "Count up to {b}."]).format(b=b)
    elif style < 0.4:
        a = rng.randint(2, 20) if rng.random() < 0.6 else rng.randint(2, 99)
        b = max(0, a - span)
        question = rng.choice(["Count down from {a} to {b}.", "count down from {a} to {b}"]).format(a=a, b=b)
    else:
        a = rng.randint(0, 20) if rng.random() < 0.6 else rng.randint(0, 89)
        b = a + span
        question = rng.choice(COUNT_QUESTIONS).format(a=a, b=b)
    step = 1 if b >= a else -1
    return question, ", ".join(str(n) for n in range(a, b + step, step))


def fact_turn(rng):
    questions, answer = rng.choice(FACTS)
    return rng.choice(questions), answer


def unknown_turn(rng):
    style = rng.random()
    if style < 0.25:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        sign = rng.choice(["-", "*", "/", " - ", " * ", " / ", " times ", " minus "])
        return rng.choice(["What is {}{}{}?", "{}{}{}", "Compute {}{}{}."]).format(a, sign, b), ONLY_ADD_ANSWER
    if style < 0.55:
        a = rng.randint(100, 999) if rng.random() < 0.6 else rng.randint(1000, 99_999)
        b = rng.randint(0, 99) if rng.random() < 0.6 else rng.randint(100, 9999)
        if rng.random() < 0.5:
            a, b = b, a
        return rng.choice(["What is {} + {}?", "{} + {}", "{}+{}", "Compute {} + {}."]).format(a, b), ONLY_ADD_ANSWER
    if style < 0.65:
        text = "".join(chr(rng.choice([rng.randint(0xA1, 0x24F), rng.randint(0x391, 0x3C9), rng.randint(0x410, 0x44F),
                                       rng.randint(0x4E00, 0x4F00), rng.randint(0x1F300, 0x1F5FF)])) for _ in range(rng.randint(2, 10)))
        return text, UNKNOWN_ANSWER
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 9))]
    head = rng.choice(["", "", "What is the ", "Who is the ", "Tell me a story about the ", "Why is the ", "Where is the ", "Write a poem about ",
                       "Do you like ", "Translate ", "When did the "])
    return head + " ".join(words) + rng.choice(["?", ".", ""]), UNKNOWN_ANSWER


TURNS = [(sum_turn, 0.54), (spell_turn, 0.15), (count_turn, 0.11), (fact_turn, 0.10), (unknown_turn, 0.10)]


def dialog(rng, max_turns=8):
    """One chat: (system text or None, [(question, answer), ...])."""
    system = rng.choice(SYSTEMS) if rng.random() < 0.15 else None
    short = max_turns <= 8
    n_turns = rng.choice([1, 1, 1, 1, 1, 2, 2, 3, 3, rng.randint(1, max_turns)]) if short else rng.randint(1, max_turns)
    makers = [maker for maker, _ in TURNS]
    weights = [weight for _, weight in TURNS]
    return system, [maker(rng) for maker in rng.choices(makers, weights, k=n_turns)]
