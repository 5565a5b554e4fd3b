// The page's side of the worker.

/** The network behind promises and one callback. */
export class Engine {
  /** @param onMessage called with each message of the worker but "decoded"; see worker.js */
  constructor(onMessage) {
    this.onMessage = onMessage;
    this.run = 0;
    this.decodings = new Map(); // by their numbers
    this.lastDecoding = 0;
  }

  /** Start the worker, anew after a failure, and let it load the model. */
  load(model) {
    this.worker?.terminate();
    this.isLoaded = false;
    for (const { reject } of this.decodings.values()) reject(new Error("the worker has ended"));
    this.decodings.clear();
    this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => {
      event.preventDefault();
      const reason = event.message ? ` (${event.message})` : "";
      const message = this.isLoaded ? `The network stopped with an error${reason}.`
        : `The page’s worker.js is missing, or cannot run in this browser${reason}.`;
      this.onMessage({ kind: "failed", while: "load", message });
    };
    this.worker.postMessage({ kind: "load", model });
  }

  /** Start a job, and end the one before. Messages of older jobs are not passed on. */
  draw(job) {
    this.run += 1;
    this.worker.postMessage({ kind: "draw", job: { ...job, run: this.run } });
  }

  stop() {
    this.worker?.postMessage({ kind: "stop" });
  }

  /** Return a promise of the pixels of latents; it fails, without a message, while the network is not loaded. */
  async decode(latents) {
    if (!this.isLoaded) throw new Error("the network is not loaded");
    this.lastDecoding += 1;
    const id = this.lastDecoding;
    return new Promise((resolve, reject) => {
      this.decodings.set(id, { resolve, reject });
      this.worker.postMessage({ kind: "decode", id, latents });
    });
  }

  receive(data) {
    if (data.kind === "ready") this.isLoaded = true;
    const waiting = this.decodings.get(data.id);
    if (waiting) {
      this.decodings.delete(data.id);
      if (data.kind === "decoded") waiting.resolve(data.pixels);
      else waiting.reject(new Error(data.message));
      if (data.kind === "failed") this.onMessage(data);
    } else if (data.run === undefined || data.run === this.run) {
      this.onMessage(data);
    }
  }
}
