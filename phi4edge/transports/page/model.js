// The model: fetched as a stream straight into WebAssembly's memory, so that it is never in memory twice.

import { Wllama } from "/wllama/wllama.js";

const TRIES = 6;
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// What wllama takes for a Blob: its size and its stream.
class RemoteFile {
  constructor(url, size, arrived) {
    Object.assign(this, { url, size, arrived });
  }

  stream() {
    let at = 0, reader = null, failures = 0;
    const file = this;
    return new ReadableStream({
      async pull(controller) {
        for (;;) {
          if (at === file.size) return controller.close();
          try {
            if (!reader) {
              const answer = await fetch(file.url, at ? { headers: { Range: `bytes=${at}-` } } : {});
              if (answer.status !== (at ? 206 : 200)) throw new Error(`the computer answered ${answer.status}`);
              reader = answer.body.getReader();
            }
            const { done, value } = await reader.read();
            if (done) throw new Error("the transfer ended early");
            at += value.byteLength;
            failures = 0;
            if (at > file.size) return controller.error(new Error("more arrived than the file has"));
            controller.enqueue(value);
            return file.arrived(value.byteLength);
          } catch (error) {
            reader = null;
            if (++failures === TRIES) return controller.error(new Error(`the model does not arrive: ${error.message}`));
            await pause(500 * failures);
          }
        }
      },
    }, { highWaterMark: 0 });
  }
}

export async function loadModel(job, onProgress) {
  const log = [];
  const keep = (...words) => { if (log.length < 2000) log.push(words.map(String).join(" ").slice(0, 400)); };
  const wllama = new Wllama(
    { "single-thread/wllama.wasm": "/wllama/single-thread.wasm", "multi-thread/wllama.wasm": "/wllama/multi-thread.wasm" },
    { logger: { debug: keep, log: keep, warn: keep, error: keep } },
  );
  const total = job.files.reduce((sum, size) => sum + size, 0);
  const began = performance.now();
  let arrived = 0, last = began;
  const files = job.files.map((size, i) => new RemoteFile(`/model/${i}`, size, (count) => {
    arrived += count;
    last = performance.now();
    onProgress(arrived, total);
  }));
  const settings = job.settings;
  const threads = settings.threads ?? Math.max(1, Math.floor((navigator.hardwareConcurrency || 1) / 2));
  try {
    await wllama.loadModel(files, {
      n_ctx: settings.context,
      n_batch: settings.batch,
      n_threads: threads,
      flash_attn: settings.flash_attention,
      cache_type_k: settings.kv_type,
      cache_type_v: settings.kv_type,
    });
  } catch (error) {
    const said = log.filter((line) => /error|fail|memory/i.test(line)).slice(-3).join("; ");
    throw new Error(`the model does not load: ${error.message}${said ? ` (${said})` : ""}`);
  }
  const loaded = wllama.getLoadedContextInfo();
  const told = {
    transfer_s: (last - began) / 1000,
    load_s: (performance.now() - last) / 1000,
    transferred: arrived,
    threads: wllama.getNumThreads(),
    info: {
      threads_asked: threads,
      vocab_size: loaded.n_vocab,
      context: loaded.n_ctx,
      batch: loaded.n_batch,
      ubatch: loaded.n_ubatch,
      layers: loaded.n_layer,
      hidden_size: loaded.n_embd,
      architecture: loaded.metadata["general.architecture"] ?? null,
    },
    log: log.filter((line) => !/ - kv /.test(line)).slice(0, 150),
  };
  return { wllama, told };
}
