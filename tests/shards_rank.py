"""What one rank of tests/test_shards.py does: ``python shards_rank.py FOLDER MODEL``, with torchrun's environment.

It writes what it found to FOLDER/rank-N.json; the last thing that rank 1 does is to die.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from dbattn import AttentionDB, RetrievalConfig, RowSource, dense_attention
from dbattn.metrics import relative_error
from dbattn.shards import ShardError

FOLDER, MODEL = Path(sys.argv[1]), Path(sys.argv[2])
RANK, HEADS, DIM = int(os.environ["RANK"]), 2, 16
ALL = {"k": 10**6, "dense_below": 0, "audit_rate": 0.0}
FOUND = {}
# A group that has ended may still hold its port.
PORTS = os.environ["PORTS"].split(",")


def rows(n, batch=1):
    return torch.randn(batch, HEADS, n, DIM), torch.randn(batch, HEADS, n, DIM)


def both(n=2600, batch=1, start=None, keys=None, **options):
    """The same rows in shards and in one store."""
    config = RetrievalConfig(**options)
    keys, values = rows(n, batch) if keys is None else keys
    dbs = [AttentionDB(HEADS, DIM, config=config, group=group) for group in (dist.group.WORLD, None)]
    for db in dbs:
        db.insert(keys[:, :, :1100], values[:, :, :1100], start=start)
        db.insert(keys[:, :, 1100:], values[:, :, 1100:])
    return *dbs, keys, values


def query(m=1, batch=1):
    return torch.randn(batch, 2 * HEADS, m, DIM)


def worst(got, wanted):
    return float(relative_error(got, wanted).max())


def message(kind, work):
    try:
        work()
    except kind as error:
        return str(error)
    return "nothing was raised"


def exactness():
    start = torch.tensor([0, 700])
    db, one, keys, values = both(batch=2, start=start, **ALL)
    for name, m in (("decode", 1), ("prompt", 1200)):
        asked = query(m, 2)
        FOUND[f"exact {name}"] = worst(db.attend(asked), dense_attention(asked, keys, values, start=start))
    asked, extra = query(2, 2), RowSource(*rows(7, 2))
    options = {"extra": extra, "sink_logits": torch.randn(2 * HEADS), "softcap": 5.0, "scale": 0.3, "return_lse": True}
    (out, lse), (wanted, wanted_lse) = (each.attend(asked, **options) for each in (db, one))
    FOUND["exact with what a call brings"] = max(worst(out, wanted), float((lse - wanted_lse).abs().max()))
    FOUND["rows held"] = [len(db), len(db.store)]
    twin = db.fork()
    for length in (2000, 1100, 300):
        for each in (db, one):
            each.truncate(length)
        asked = query(1, 2)
        FOUND[f"cut to {length}"] = worst(db.attend(asked), one.attend(asked))
    more = rows(800, 2)
    for each in (db, one):
        each.insert(*more)
    FOUND["cut and grown"] = worst(db.attend(asked), one.attend(asked))
    FOUND["fork"] = worst(twin.attend(asked), dense_attention(asked, keys, values, start=start))
    hits, wanted = db.search(asked, 9), one.search(asked, 9)
    FOUND["search"] = torch.equal(hits.ids, wanted.ids)


def retrieval():
    # A few lists of the rows of one rank alone hold what queries ask for.
    keys, values = rows(5000)
    keys[:, :, 512:600] += 1.5
    needles = keys[:, :, 512:600]
    options = {"k": 192, "audit_rate": 0.0, "dense_below": 0}
    db, one, keys, values = both(keys=(keys, values), **options)
    errors = {"shards": [], "one": []}
    for i in range(24):
        asked = 0.7 * query() + needles[:, :, 3 * i : 3 * i + 1].repeat_interleave(2, dim=1)
        dense = dense_attention(asked, keys, values)
        for name, each in (("shards", db), ("one", one)):
            errors[name].append(float(relative_error(each.attend(asked), dense).mean()))
    FOUND["errors"] = {name: sum(each[8:]) / len(each[8:]) for name, each in errors.items()}
    FOUND["retrieving"] = db.stats.retrieving
    plan = db.explain(asked)
    FOUND["explain"] = str(plan)
    FOUND["parts"] = [int(part) for part in re.search(r"by need as (\d+) \+ (\d+)", plan.reason).groups()]
    FOUND["sources"] = [(source.kind, source.actual.bytes, source.actual.rows, source.mass) for source in plan.sources]
    report = db.audit(asked)
    FOUND["audit"] = [report.recall, report.attention_mass, report.relative_error, report.rows_stored]
    FOUND["audit by hand"] = float(relative_error(db.attend(asked), dense).mean())
    several = query(3)
    db.config = one.config = RetrievalConfig(**options, max_queries=8)
    before = db.stats.retrieving
    out, dense = db.attend(several), dense_attention(several, keys, values)
    found = [float(relative_error(each, dense).mean()) for each in (out, one.attend(several))]
    FOUND["several positions"] = [*found, db.stats.retrieving - before]


def bound():
    db, _, keys, values = both(5000, max_error=0.05, dense_below=0)
    kept = []
    for _ in range(12):
        asked = query()
        kept.append(
            float((relative_error(db.attend(asked), dense_attention(asked, keys, values)) <= 0.05).float().mean())
        )
    FOUND["within"], FOUND["rungs"] = sum(kept) / len(kept), dict(db.stats.rungs)
    FOUND["bytes of dense"] = db.stats.bytes_read / db.stats.bytes_dense


def refusals():
    group = dist.group.WORLD
    for name, options in (("host", {"rows": "host"}), ("prefill", {"prefill": "lists"})):
        FOUND[f"refused {name}"] = message(
            ValueError, lambda o=options: AttentionDB(2, 16, config=RetrievalConfig(**o), group=group)
        )
    db = AttentionDB(HEADS, DIM, group=group)
    db.insert(*rows(600))
    bad = rows(600)
    bad[0][0, 0, 0, 0] = float("nan")  # of rank 1's rows
    FOUND["refused rows"] = message(ValueError, lambda: db.insert(*bad)), len(db)
    FOUND["refused weights"] = message(ValueError, lambda: db.weights(query()))
    FOUND["out of step"] = message(ShardError, lambda: (db.insert(*rows(1 + RANK)), db.attend(query())))


def snapshots():
    group, path = dist.group.WORLD, FOLDER / "db"
    db, one, *_ = both(k=64, dense_below=0, audit_rate=0.0)
    asked = query()
    db.save(path)
    opened = AttentionDB.open(path, group=group)
    FOUND["opened"] = [torch.equal(opened.attend(asked), db.attend(asked)), len(opened)]
    opened.insert(*rows(700))
    report = opened.save(path)
    FOUND["saved again"] = [report.files_kept > 0, len(AttentionDB.open(path, group=group)), sorted(os.listdir(path))]
    # A save that ends on one rank, for whatever reason, leaves what there was.
    import dbattn.snapshot.writer as writer

    publish = writer.publish
    if RANK == 1:

        def refuse(*_):
            raise OSError(28, "No space left on device")

        writer.publish = refuse
    opened.insert(*rows(900))
    FOUND["refused save"] = message(OSError, lambda: opened.save(path))
    writer.publish = publish
    FOUND["after a refused save"] = len(AttentionDB.open(path, group=group))
    opened.save(path)
    FOUND["alone"] = message(ValueError, lambda: AttentionDB.open(path))
    one.save(FOLDER / f"one-{RANK}")
    FOUND["of one process"] = message(ValueError, lambda: AttentionDB.open(FOLDER / f"one-{RANK}", group=group))
    dist.barrier()
    if RANK == 0:
        shutil.copytree(path, FOLDER / "lacking")
        part = next((FOLDER / "lacking").glob("save-*")) / "shard-1"
        shutil.rmtree(part)
        shutil.copytree(path, FOLDER / "of three")
        said = FOLDER / "of three" / "shards.json"
        data = json.loads(said.read_text())
        data["digests"].append(data["digests"][0])
        said.write_text(json.dumps(data))
    dist.barrier()
    FOUND["lacking"] = message(ValueError, lambda: AttentionDB.open(FOLDER / "lacking", group=group))
    FOUND["of three"] = message(ValueError, lambda: AttentionDB.open(FOLDER / "of three", group=group))


def models():
    from transformers import AutoModelForCausalLM

    from dbattn.hf import wrap

    group, path = dist.group.WORLD, FOLDER / "context"
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    ids = torch.randint(2, 900, (1, 1300))
    options = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 1}
    with torch.inference_mode():
        dense = model.generate(ids, do_sample=False, **options)
    with torch.inference_mode(), wrap(model, RetrievalConfig(**ALL), group=group) as handle:
        FOUND["greedy is dense's"] = torch.equal(model.generate(ids, do_sample=False, **options), dense)
        padded, mask = torch.cat([ids.new_ones(1, 600), ids[:, :700]], dim=1), torch.ones(2, 1300, dtype=torch.int64)
        mask[0, :600] = 0
        batch = {"input_ids": torch.cat([padded, ids]), "attention_mask": mask}
        FOUND["padded"] = model.generate(**batch, do_sample=False, **options)[1].tolist() == dense[0].tolist()
    with torch.inference_mode(), wrap(model, RetrievalConfig(k=64, dense_below=0), group=group) as handle:
        torch.manual_seed(RANK)
        sampled = model.generate(ids, do_sample=True, **options)
        FOUND["sampled"] = sampled[0, -10:].tolist()
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        handle.save(path, cache)
        with handle.audit() as audits:
            logits = model(ids[:, :1], past_key_values=cache).logits
        FOUND["audits"] = len(audits)
        FOUND["explained"] = str(handle.explain())
        FOUND["other tokens"] = message(
            ShardError, lambda: model(ids[:, RANK : RANK + 1] + RANK, past_key_values=cache)
        )
    with torch.inference_mode(), wrap(model, context=path, group=group) as handle:
        FOUND["context"] = torch.equal(handle.context, ids)
        cache = handle.new_cache()
        again = model(ids[:, :1], past_key_values=cache).logits
        FOUND["after the context"] = float((again - logits).abs().max() / logits.abs().max())
        cache.crop(-1)
        FOUND["cropped"] = cache.get_seq_length()
    FOUND["refused exact"] = message(ValueError, lambda: wrap(model, exact=True, group=group))
    FOUND["given back"] = "generate" not in vars(model)


def commands():
    import dbattn.cli.ingest as ingest
    from dbattn.cli import main

    text, out = FOLDER / "text.txt", FOLDER / "text.dbattn"
    if RANK == 0:
        text.write_text(" ".join(f"the number {i * 7919 % 1000} is here." for i in range(220)))
    dist.barrier()
    dist.destroy_process_group()
    if RANK == 1:
        # A rank may be so slow that the others have made the folder before it begins.
        begin = ingest.read_text

        def slowly(file):
            time.sleep(1)
            return begin(file)

        ingest.read_text = slowly
    said = []
    for arguments in (
        ["ingest", str(text), "--out", str(out), "--model", str(MODEL), "--tokens", "700"],
        ["ingest", str(text), "--out", str(out), "--model", str(MODEL), "--tokens", "1200"],
        ["ask", str(out), "what is here?", "--model", str(MODEL), "--max-tokens", "6", "--quiet"],
        ["ask", str(out), "what is here?", "--model", str(MODEL), "--show-sources"],
        ["chat", str(out)],
    ):
        os.environ["MASTER_PORT"] = PORTS.pop()
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(arguments)
        said.append([code, printed.getvalue(), errors.getvalue().splitlines()[-1:]])
    FOUND["commands"] = said


def death():
    os.environ["MASTER_PORT"] = PORTS.pop()
    dist.init_process_group("gloo")
    db = AttentionDB(HEADS, DIM, group=dist.group.WORLD, config=RetrievalConfig(**ALL))
    db.insert(*rows(1500))
    db.save(FOLDER / "before the end")
    if RANK == 1:
        write()
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.perf_counter()
    FOUND["death"] = message(ShardError, lambda: [db.attend(query()) for _ in range(3)])
    FOUND["death save"] = message(ShardError, lambda: db.save(FOLDER / "before the end"))
    FOUND["death seconds"] = time.perf_counter() - began


def write():
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(FOUND))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = PORTS.pop()
    dist.init_process_group("gloo")
    for part in (exactness, retrieval, bound, refusals, snapshots, models, commands, death):
        torch.manual_seed(0)
        began = time.perf_counter()
        print(part.__name__, file=sys.stderr, flush=True)
        try:
            part()
        except Exception:
            FOUND["raised"] = FOUND.get("raised", "") + f"rank {RANK}: {traceback.format_exc()}"
        FOUND[f"seconds of {part.__name__}"] = time.perf_counter() - began
    write()
