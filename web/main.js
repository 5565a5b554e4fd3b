// The page: its controls, and what happens when they are used.

import { fromRgb, pack, toPixels, unpack } from "./bytes.js";
import { Problem, fetchModel } from "./download.js";
import { Engine } from "./engine.js";
import { dieIcon, typeButton } from "./parts.js";
import { MAX_SEED, Noise } from "./random.js";
import { addNoise, startOfDrawing } from "./sampler.js";
import { describe, savePng } from "./save.js";
import { canGuide, fit, fromHash, guideOf, itemsOf, limits, list, samplerOf, toHash } from "./settings.js";
import { Sketch } from "./sketch.js";
import { Stage } from "./stage.js";
import { inTrouble, note, say, show, trouble } from "./words.js";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["count", "frames", "guidance", "steps", "strength"];

let model, stage, sketch;
let isBuilt = false; // stage and controls are made, which happens once
let settings; // what the controls say
let drawn; // the settings of what the stage shows, and the items of its job
let ready = false; // the network is loaded
let drawWhenReady = false; // for a link, or for "Try again" after a drawing that failed
let running = false; // the worker is drawing
let links = 0; // opened so far: of two that wait for something the later one counts
let draws = 0; // begun so far, likewise
const engine = new Engine(receive);

// ---------------------------------------------------------------------------------------------------------------------
// the beginning

async function begin() {
  $("alone").hidden = true;
  if (stage && !isBuilt) return location.reload(); // half of the controls are there already
  trouble("");
  if (!hasWebAssembly()) {
    return trouble("This browser cannot run the network: it has no WebAssembly, or one without SIMD. Firefox, Chrome, "
                   + "Edge and Safari of 2023 and later have it.");
  }
  try {
    model ??= await fetchModel();
    if (!isBuilt) {
      build();
      await openLink();
      isBuilt = true;
    }
  } catch (error) {
    return trouble(error instanceof Problem ? error.message
      : `The page cannot start (${error.message}). If a reload does not help, export page and model again.`);
  }
  $("main").hidden = false;
  setReady(false);
  say("Loading the network …");
  engine.load(model);
}

/** Return whether there is WebAssembly with 128-bit SIMD, by a module whose only function makes one such vector. */
function hasWebAssembly() {
  const module = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(module));
}

function build() {
  stage = new Stage({ scene: $("scene"), picture: $("picture"), pictureCaption: $("picture-caption"), guess: $("guess"),
                      time: $("time"), play: $("play"), morphRow: $("morph-row"), morph: $("morph"),
                      morphPlay: $("morph-play"), morphFrom: $("morph-from"), morphTo: $("morph-to"),
                      gallery: $("gallery"), thumbnails: $("thumbnails") },
                    model, (latents) => engine.decode(latents), updateActions);
  sketch = new Sketch({ canvas: $("sketch"), swatches: $("swatches"), brush: $("brush"), undo: $("undo"),
                        clear: $("clear"), file: $("file") },
                      model.image_size, {
                      onChange: preview,
                      onPicture: () => set("mode", "drawing"),
                      onTrouble: (sentence) => { $("sketch-trouble").textContent = sentence; },
                    });
  buildControls();
  const size = `${model.image_size} × ${model.image_size} pixels`;
  const types = model.types.length ? `, ${model.types.length} types` : "";
  const bytes = Object.values(model.bytes ?? {}).reduce((sum, part) => sum + part, 0);
  const megabytes = bytes ? `, ${(bytes / 1e6).toFixed(1)} MB` : "";
  $("about").textContent = `Model “${model.name}”: ${size}${types}${megabytes}. Made with PokeDiff.`;
}

/** Take settings and drawing from the address, and say what of it could not be taken. */
async function openLink() {
  links += 1;
  const link = links;
  const fromLink = location.hash.length > 1;
  const { settings: asked, notes } = fromHash(location.hash, model);
  if (!fromLink) asked.seed = randomSeed();
  let drawing = null;
  if (asked.mode === "drawing" && asked.drawing) {
    try {
      drawing = await unpack(asked.drawing, 3 * model.image_size ** 2);
    } catch {
      notes.push("The drawing in the link is damaged; here the canvas is empty.");
    }
    if (link !== links) return; // a later one is open
  }
  if (samplerOf(model) !== model.sampler.name) {
    notes.push(`The model asks for the sampler “${model.sampler.name}”; this page draws with ${samplerOf(model)}.`);
  }
  note(notes);
  $("sketch-trouble").textContent = "";

  settings = asked;
  if (drawing) sketch.write(drawing);
  else if (!sketch.empty) sketch.wipe(); // a link is all there is to its creatures; Undo brings the old drawing back
  showSettings();
  drawWhenReady = fromLink && !(settings.mode === "drawing" && sketch.empty);
}

// ---------------------------------------------------------------------------------------------------------------------
// controls

function buildControls() {
  for (const name of SLIDERS) {
    const { min, max, unit } = limits(name, model);
    Object.assign($(name), { min, max, step: name === "strength" ? 0.05 : unit });
    $(name).addEventListener("input", () => set(name, fit(name, $(name).value, model)));
  }
  for (const name of ["seed", "to"]) {
    $(name).max = MAX_SEED;
    $(name).addEventListener("change", () => set(name, fit(name, $(name).value, model) ?? settings[name]));
    const dice = $(name === "seed" ? "dice" : "to-dice");
    dice.append(dieIcon());
    dice.addEventListener("click", () => set(name, randomSeed()));
  }
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.addEventListener("change", () => set("mode", input.value));
  }
  for (const name of model.types) $("types").append(typeButton(name, () => toggleType(name)));
  $("types-panel").hidden = model.types.length === 0;
  $("guidance-panel").hidden = !canGuide(model);

  $("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    note([]); // they were about the link that was opened
    draw();
  });
  $("another").prepend(dieIcon());
  $("another").addEventListener("click", () => {
    note([]);
    set("seed", randomSeed());
    if (settings.mode === "morph") set("to", randomSeed());
    draw();
  });
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  $("notes-close").addEventListener("click", () => note([]));
  $("save").addEventListener("click", () => save([stage.current], stage.moment));
  $("save-all").addEventListener("click", () => save(stage.creatures));
  $("copy").addEventListener("click", copyLink);
  $("draw-on").addEventListener("click", drawOnIt);
  window.addEventListener("hashchange", async () => {
    await openLink();
    if (drawWhenReady && ready) draw();
  });
}

/** Add a type to the set, or take it out. */
function toggleType(name) {
  const others = settings.types.filter((type) => type !== name);
  if (others.length < settings.types.length) set("types", others);
  else set("types", [...others, name].slice(-model.max_types)); // one too many replaces the first
}

function set(name, value) {
  settings[name] = value;
  showSettings();
}

/** Make the controls say what the settings are. */
function showSettings() {
  const { mode, types } = settings;
  for (const name of SLIDERS) {
    $(name).value = settings[name];
    $(`${name}-value`).textContent = name === "strength" ? `${Math.round(100 * settings.strength)} %` : settings[name];
  }
  for (const name of ["seed", "to"]) $(name).value = settings[name];
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  $("sketch-panel").hidden = mode !== "drawing";
  $("to-panel").hidden = mode !== "morph";
  $("seed-label").textContent = mode === "morph" ? "From seed" : "Seed";
  $("count-panel").hidden = mode === "morph";
  $("frames-panel").hidden = mode !== "morph";
  for (const button of $("types").children) {
    button.setAttribute("aria-pressed", String(types.includes(button.dataset.type)));
  }
  const most = model.max_types < model.types.length ? `; at most ${model.max_types}` : "";
  $("types-hint").textContent = types.length ? list(types) : `none chosen: any${most}`;
  $("guidance").disabled = !canGuide(model, types);
  $("guidance-hint").textContent = guideOf(model) === "earlier" ? "clearer, less varied; 1 is off"
    : types.length ? "how typical of its types" : "needs a type";
  preview();
}

/** Show the noise that the settings begin with, before anything is drawn. */
function preview() {
  let x = new Noise(settings.seed, model.channels * model.height * model.width).x_T;
  if (settings.mode === "drawing" && !model.latent) {
    const { start } = startOfDrawing(settings.strength, 1, model.timesteps);
    x = addNoise(model.alpha_bar, fromRgb(sketch.read()), start, x);
  }
  const pixels = toPixels(x, model.width, model.height);
  stage.preview(pixels, `The noise of seed ${settings.seed}`);
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1e6; // six digits are easily told to a friend

// ---------------------------------------------------------------------------------------------------------------------
// drawing

async function draw() {
  drawWhenReady = false;
  if (settings.mode === "drawing" && sketch.empty) {
    $("sketch-trouble").textContent = "The canvas is empty: draw something first, or choose a picture.";
    return $("sketch").focus();
  }
  draws += 1;
  const number = draws;
  const chosen = { ...settings };
  const drawing = chosen.mode === "drawing" ? sketch.read() : null;
  chosen.drawing = drawing ? await pack(drawing).catch(() => "") : ""; // an old browser cannot pack it: a shorter link
  if (number !== draws) return; // a later one has begun
  trouble("");
  drawn = { ...chosen, items: itemsOf(chosen) };
  history.replaceState(null, "", `#${toHash(drawn, model)}`);
  $("link").hidden = true;
  $("action-status").textContent = "";

  stage.begin(drawn.items.map(({ name }) => name), drawn.mode === "morph");
  $("actions").hidden = false;
  setRunning(true);
  updateActions();
  say(drawn.items.length > 1 ? `Drawing ${drawn.items.length} creatures.` : "Drawing a creature.");
  const labels = model.types.length ? Float32Array.from(model.types, (name) => Number(drawn.types.includes(name)))
    : null;
  const guidance = canGuide(model, drawn.types) ? drawn.guidance : 1;
  engine.draw({ items: drawn.items, labels, guidance, steps: drawn.steps, sampler: samplerOf(model),
                strength: drawn.strength, drawing });
  if (stage.picture.getBoundingClientRect().top < 0) {
    $("picture").scrollIntoView({ block: "center", behavior: stage.still.matches ? "instant" : "smooth" });
  }
}

function stop() {
  if (!running) return;
  engine.stop();
  say("Stopping …");
}

function setReady(value) {
  ready = value;
  for (const id of ["draw", "another"]) $(id).disabled = !value;
}

function setRunning(value) {
  running = value;
  $("stop").setAttribute("aria-disabled", String(!value)); // stays in the order of the Tab key
  $("save-all").hidden = value || stage.creatures.filter(({ done }) => done).length < 2;
}

/** Let be saved what is done. */
function updateActions() {
  for (const id of ["save", "copy", "draw-on"]) $(id).disabled = !stage.current?.done;
}

/** Handle a message of the worker. */
function receive(message) {
  const { kind } = message;
  if (kind === "progress") {
    const { received, total } = message;
    if (total) $("progress").value = received / total;
    else $("progress").removeAttribute("value");
    show(`Loading the network: ${(received / 1e6).toFixed(1)}${total ? ` of ${(total / 1e6).toFixed(1)}` : ""} MB`);
  } else if (kind === "preparing") {
    show("Starting the network …");
  } else if (kind === "ready") {
    setReady(true);
    $("progress").value = 0;
    say("Ready.");
    if (drawWhenReady) draw();
  } else if (kind === "start") {
    stage.start(message);
  } else if (kind === "step" || kind === "image") {
    step(message);
  } else if (kind === "done") {
    setRunning(false);
    const { length } = drawn.items;
    const seconds = message.seconds.toFixed(1);
    say(length === 1 ? `A creature in ${seconds} s.`
      : `${length} creatures in ${seconds} s, ${(message.seconds / length).toFixed(1)} s each.`);
  } else if (kind === "stopped") {
    const finished = stage.creatures.filter(({ done }) => done).length;
    setRunning(false);
    say(`Stopped: ${finished} of ${drawn.items.length} done.`);
  } else if (kind === "failed") {
    fail(message);
  }
}

function step(message) {
  const { index, kind } = message;
  stage.step(message, kind === "image");
  const { steps } = stage.creatures[index];
  const { length } = drawn.items;
  $("progress").value = (index + (message.step + 1) / steps) / length;
  const which = length > 1 ? `Creature ${index + 1} of ${length}: ` : "";
  show(`${which}step ${message.step + 1} of ${steps}`);
  if (kind === "image") {
    say(`${which}done.`);
  }
}

function fail({ message, while: doing }) {
  if (doing === "decode") { // a frame that cannot be shown ends no drawing, and is less than what is said already
    if (!inTrouble()) trouble(message);
    return;
  }
  if (running) drawWhenReady = true; // by "Try again"
  setRunning(false);
  if (doing === "load") setReady(false);
  $("progress").value = 0;
  say(doing === "load" ? "The network is not loaded." : "It did not work.");
  trouble(message);
}

// ---------------------------------------------------------------------------------------------------------------------
// taking creatures along

/** Return the settings that make the creature of the stage alone, whatever is beside it. */
function settingsOfCurrent() {
  if (drawn.mode === "morph") return drawn;
  return { ...drawn, seed: drawn.items[stage.index].seed, count: 1 };
}

const linkTo = (chosen) => `${location.href.split("#")[0]}#${toHash(chosen, model)}`;

async function copyLink() {
  const link = linkTo(settingsOfCurrent());
  const long = link.length > 2000 ? ` It is long (${(link.length / 1000).toFixed(1)} kB), for the drawing is inside.`
    : "";
  try {
    await navigator.clipboard.writeText(link);
    $("action-status").textContent = `The link is copied.${long}`;
  } catch { // not allowed, or not on a secure page
    $("link").value = link;
    $("link").hidden = false;
    $("link").select();
    $("action-status").textContent = `Copy the link from the field.${long}`;
  }
}

/** Put the creature on the canvas, to change it and to draw from it again. */
async function drawOnIt() {
  const pixels = stage.current.x.at(-1).pixels;
  if (!pixels || !stage.current.done) return;
  set("mode", "drawing");
  sketch.write(new Uint8Array(pixels).filter((_, i) => i % 4 !== 3));
  $("sketch").focus();
}

/** Save creatures as one PNG, with their settings inside. @param moment a step; none: the last */
async function save(creatures, moment) {
  const chosen = creatures.filter(({ done }) => done);
  const pictures = chosen.map(({ x }) => x[Math.min(moment ?? Infinity, x.length - 1)].pixels);
  if (!chosen.length || pictures.some((pixels) => !pixels)) return;
  const items = chosen.map((creature) => drawn.items[stage.creatures.indexOf(creature)]);
  const inside = describe(drawn, items, model, linkTo(chosen.length > 1 ? drawn : settingsOfCurrent()));
  if (moment !== undefined && moment < chosen[0].steps) inside.shown_step = moment;
  try {
    const name = await savePng(pictures, drawn.mode === "morph", inside);
    $("action-status").textContent = `Saved as ${name}.`;
  } catch (error) { // an old browser cannot compress
    $("action-status").textContent = `This browser could not save the PNG: ${error.message}.`;
  }
}

$("retry").addEventListener("click", begin);
begin();
