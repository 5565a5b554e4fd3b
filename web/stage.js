// What was drawn: the picture at a moment of its making, what the network expected then, and the others beside it.

/** Shows creatures and their making. `current` is the creature that is shown. */
export class Stage {
  /**
   * @param elements {scene, picture, pictureCaption, guess, time, play, morphRow, morph, morphPlay, morphFrom, morphTo,
   *   gallery, thumbnails}
   * @param model the content of model.json
   * @param decode (latents) -> promise of pixels, for a model of latents
   * @param onSelect called when another creature is shown, or the shown one is done
   */
  constructor(elements, model, decode, onSelect) {
    Object.assign(this, elements, { model, decode, onSelect });
    this.creatures = [];
    this.index = 0;
    this.follow = true; // show the creature and the moment that are being worked at
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    document.body.classList.toggle("pixels", model.image_size <= 64);
    this.time.addEventListener("input", () => {
      this.pause();
      this.follow = false;
      this.paint();
    });
    this.morph.addEventListener("input", () => {
      this.pause();
      this.choose(Number(this.morph.value));
    });
    this.play.addEventListener("click", () => this.toggle(this.play, () => this.playTime()));
    this.morphPlay.addEventListener("click", () => this.toggle(this.morphPlay, () => this.playMorph()));
  }

  get current() {
    return this.creatures[this.index];
  }

  /**
   * Begin with creatures that are not drawn yet.
   * @param names of each, as in "seed 7"
   * @param isMorph whether they lead from the first to the last
   */
  begin(names, isMorph) {
    this.pause();
    this.picture.wanted = this.guess.wanted = null; // what is still being decoded is of creatures before
    this.scene.classList.remove("empty");
    this.morphRow.hidden = !isMorph;
    this.morph.max = names.length - 1;
    this.morphFrom.textContent = capital(names[0]);
    this.morphTo.textContent = capital(names.at(-1));
    this.creatures = names.map((name) => ({ name, x: [], guesses: [], t: [], steps: 0, done: false }));
    this.index = 0;
    this.follow = true;
    this.thumbnails.replaceChildren(...names.map((name, index) => this.thumbnail(name, index)));
    this.gallery.hidden = names.length < 2;
    this.thumbnails.classList.toggle("many", names.length > 8);
  }

  thumbnail(name, index) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "creature", value: index, checked: index === 0 });
    input.setAttribute("aria-label", `Creature ${index + 1}, ${name}`);
    input.addEventListener("change", () => this.choose(index));
    const canvas = document.createElement("canvas");
    label.title = name;
    label.append(input, canvas);
    return label;
  }

  /** Show a creature that the visitor chose. */
  choose(index) {
    this.follow = false;
    this.select(index);
  }

  select(index) {
    this.index = index;
    this.thumbnails.querySelectorAll("input")[index].checked = true;
    this.morph.value = index;
    this.morph.setAttribute("aria-valuetext", this.current.name);
    this.time.max = this.current.steps || this.time.max;
    this.time.value = this.current.x.length - 1;
    this.paint();
    this.onSelect();
  }

  /** A creature begins: x_t at timestep t. */
  start({ index, steps, t, x_t }) {
    const creature = this.creatures[index];
    Object.assign(creature, { steps, x: [x_t], t: [t] });
    this.time.disabled = this.play.disabled = false;
    this.advance(index);
  }

  /** A step is done: from the last x_t the network predicted x_0, and x_t is the next. */
  step({ index, t, x_t, x_0 }, done) {
    const creature = this.creatures[index];
    creature.guesses.push(x_0);
    creature.x.push(x_t);
    creature.t.push(t);
    creature.done = done;
    this.advance(index);
  }

  advance(index) {
    const creature = this.creatures[index];
    if (this.still.matches && !creature.done) return; // no flicker of noise for those who do not want it
    const shown = creature.x.at(-1).pixels ? creature.x.at(-1) : creature.guesses.findLast((guess) => guess.pixels);
    paintInto(this.thumbnails.querySelectorAll("canvas")[index], shown?.pixels);
    if (this.follow) this.select(index);
    else if (index === this.index) {
      this.time.max = creature.steps;
      this.onSelect();
    }
  }

  /** Show some pixels before there is a creature. */
  preview(pixels, caption) {
    if (this.creatures.length) return;
    paintInto(this.picture, pixels);
    paintInto(this.guess, null);
    this.pictureCaption.textContent = caption;
  }

  /** Return the moment that is shown, a number of steps. */
  get moment() {
    return Math.min(Number(this.time.value), this.current.x.length - 1);
  }

  paint() {
    const { current } = this;
    if (!current?.x.length) return this.paintNothing();
    const { moment } = this;
    const last = moment === current.x.length - 1;
    const guess = current.guesses[moment] ?? current.guesses.at(-1);
    this.show(this.picture, current.x[moment]);
    this.show(this.guess, guess);
    const noise = current.t[moment] < 0 ? 0 : Math.sqrt(1 - this.model.alpha_bar[current.t[moment]]);
    const percent = `${Math.round(100 * noise)} % noise`;
    const step = `step ${moment} of ${current.steps}, ${percent}`;
    this.pictureCaption.textContent = current.done && last ? capital(current.name) : capital(step);
    this.time.setAttribute("aria-valuetext", step);
    this.picture.setAttribute("aria-label", current.done && last ? `The creature of ${current.name}`
      : `The picture of ${current.name} at ${step}`);
    this.guess.setAttribute("aria-label", "What the network expects the creature to be");
  }

  paintNothing() {
    for (const canvas of [this.picture, this.guess]) {
      canvas.wanted = null;
      paintInto(canvas, null);
    }
    this.pictureCaption.textContent = `${capital(this.current.name)}: not drawn`;
    this.picture.setAttribute("aria-label", "Nothing yet");
    this.guess.setAttribute("aria-label", "Nothing yet");
  }

  /** Paint a frame; latents when they are decoded, which the worker has the time for when the creature is done. */
  show(canvas, frame) {
    const { current, moment } = this;
    if (frame && !frame.pixels && !current.done) {
      frame = current.guesses.slice(0, moment + 1).findLast((guess) => guess.pixels); // the newest that was decoded
    }
    canvas.wanted = frame ?? null;
    if (frame && !frame.pixels) this.decodeWanted();
    else paintInto(canvas, frame?.pixels);
  }

  /** Decode and paint what the canvases want, one frame at a time; those that nobody wants any more are left out. */
  async decodeWanted() {
    if (this.isDecoding) return;
    this.isDecoding = true;
    const canvases = [this.picture, this.guess];
    for (;;) {
      const frame = canvases.map(({ wanted }) => wanted).find((wanted) => wanted && !wanted.pixels);
      if (!frame) break;
      try {
        frame.pixels = await this.decode(frame.latents);
      } catch { // the page says why
        for (const canvas of canvases) if (canvas.wanted === frame) canvas.wanted = null;
        continue;
      }
      for (const canvas of canvases) if (canvas.wanted === frame) paintInto(canvas, frame.pixels);
    }
    this.isDecoding = false;
  }

  // playing -----------------------------------------------------------------------------------------------------------

  toggle(button, tick) {
    const wasPlaying = button.classList.contains("playing");
    this.pause();
    if (wasPlaying || !this.current?.x.length) return;
    this.follow = false;
    button.classList.add("playing");
    tick();
  }

  /** Go from noise to creature, once. */
  playTime() {
    const last = this.current.x.length - 1;
    let k = this.moment >= last ? 0 : this.moment;
    const tick = () => {
      this.time.value = k;
      this.paint();
      if (k >= last) return this.pause();
      k += 1;
    };
    this.timer = setInterval(tick, Math.max(60, 3000 / (last + 1)));
    tick();
  }

  /** Go from the first creature to the last and back, until it is stopped. */
  playMorph() {
    const drawn = this.creatures.filter(({ done }) => done).length;
    let k = this.index;
    let way = k + 1 < drawn ? 1 : -1;
    this.timer = setInterval(() => {
      if (k + way < 0 || k + way >= drawn) way = -way;
      k = Math.min(drawn - 1, Math.max(0, k + way));
      this.select(k);
    }, 180);
  }

  pause() {
    clearInterval(this.timer);
    for (const button of [this.play, this.morphPlay]) button.classList.remove("playing");
  }
}

/** Paint square RGBA pixels, or nothing. */
export function paintInto(canvas, pixels) {
  const pen = canvas.getContext("2d");
  if (!pixels) return pen.clearRect(0, 0, canvas.width, canvas.height);
  const side = Math.sqrt(pixels.length / 4);
  if (canvas.width !== side) canvas.width = canvas.height = side;
  pen.putImageData(new ImageData(pixels, side, side), 0, 0);
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
