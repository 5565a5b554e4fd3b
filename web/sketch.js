// A canvas to draw on: by pointer, by keys, or with a picture.

const COLOURS = {
  black: "#1d1b26", grey: "#8b8896", brown: "#9a6238", red: "#e0402a", orange: "#f59330", yellow: "#fcd62c",
  green: "#5eb83e", teal: "#1ca880", sky: "#86dcee", blue: "#3a74e4", purple: "#a058d6", pink: "#f988ba",
  white: "#ffffff",
};
const CANVAS_SIZE = 320; // pixels, or the nearest multiple of the model's side
const MOST_UNDO = 30;
const LARGEST_FILE = 50e6; // bytes
const LARGEST_PICTURE = 50e6; // pixels

/** A drawing, of which the model reads `size` x `size` pixels. `empty` says whether anything is on it. */
export class Sketch {
  /**
   * @param elements {canvas, swatches, brush, undo, clear, file}
   * @param size side of the pictures that the model reads
   * @param onChange called after each stroke or picture
   * @param onPicture called before a picture that was dropped or pasted is read
   * @param onTrouble called with a sentence, or with "" when all is well again
   */
  constructor(elements, size, { onChange, onPicture, onTrouble }) {
    Object.assign(this, elements, { size, onChange, onPicture, onTrouble });
    this.factor = Math.max(1, Math.round(CANVAS_SIZE / size));
    this.side = this.canvas.width = this.canvas.height = size * this.factor;
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.pen.fillStyle = "white";
    this.pen.fillRect(0, 0, this.side, this.side);
    this.past = [];
    this.cursor = { x: this.side / 2, y: this.side / 2, down: false };
    this.empty = true;
    this.pictures = 0; // asked for so far
    this.addSwatches();
    this.listenToPointer();
    this.listenToKeys();
    this.undo.addEventListener("click", () => this.stepBack());
    this.clear.addEventListener("click", () => this.wipe());
    this.acceptPictures();
    this.file.addEventListener("change", () => {
      if (this.file.files[0]) this.readFile(this.file.files[0]);
      this.file.value = ""; // so that the same file can be chosen again
    });
    this.describe();
  }

  addSwatches() {
    for (const [name, colour] of Object.entries(COLOURS)) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "colour", value: colour, checked: name === "black" });
      input.setAttribute("aria-label", name === "white" ? "white, to erase" : name);
      const dot = document.createElement("span");
      dot.style.setProperty("--colour", colour); // set by script, which the page's policy allows
      label.title = name;
      label.append(input, dot);
      this.swatches.append(label);
    }
  }

  get colour() {
    return this.swatches.querySelector("input:checked").value;
  }

  /** Width of a stroke, in pixels of the canvas: from one to ten of the model's. */
  get width() {
    return (this.side / 32) * [0.7, 1.2, 2, 3, 5, 8][this.brush.value - 1];
  }

  // strokes -----------------------------------------------------------------------------------------------------------

  listenToPointer() {
    let last = null;
    const position = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return { x: ((event.clientX - box.left) / box.width) * this.side,
               y: ((event.clientY - box.top) / box.height) * this.side };
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.remember();
      last = position(event);
      this.line(last, last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last || !event.isPrimary) return;
      const events = event.getCoalescedEvents?.() ?? []; // the points between two frames
      for (const point of (events.length ? events : [event]).map(position)) {
        this.line(last, point);
        last = point;
      }
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      this.canvas.addEventListener(kind, () => {
        if (last) this.changed();
        last = null;
      });
    }
  }

  listenToKeys() {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.canvas.addEventListener("keydown", (event) => {
      const { cursor } = this;
      if (event.key === " ") {
        cursor.down = !cursor.down;
        if (cursor.down) {
          this.remember();
          this.line(cursor, cursor);
        } else {
          this.changed();
        }
      } else if (event.key in moves) {
        const step = (this.side / 32) * (event.shiftKey ? 4 : 1);
        const [dx, dy] = moves[event.key];
        const inside = (value) => Math.min(this.side, Math.max(0, value));
        const next = { x: inside(cursor.x + dx * step), y: inside(cursor.y + dy * step) };
        if (cursor.down) this.line(cursor, next);
        Object.assign(cursor, next);
      } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
        this.stepBack();
      } else {
        return;
      }
      event.preventDefault();
      this.showCursor();
    });
    this.canvas.addEventListener("focus", () => this.showCursor());
    this.canvas.addEventListener("blur", () => {
      if (this.cursor.down) this.changed();
      this.cursor.down = false;
      this.describe();
    });
  }

  /** Mark the brush of the keyboard, by a background of the element around the canvas. */
  showCursor() {
    const { x, y, down } = this.cursor;
    const frame = this.canvas.parentElement;
    frame.style.setProperty("--x", `${(100 * x) / this.side}%`);
    frame.style.setProperty("--y", `${(100 * y) / this.side}%`);
    frame.classList.toggle("down", down);
    this.describe();
  }

  describe() {
    const at = (value) => Math.round((value / this.side) * 32);
    const { x, y, down } = this.cursor;
    this.canvas.setAttribute("aria-label", `Drawing. Brush ${down ? "down" : "up"}, ${at(x)} across and ${at(y)} down `
                             + "of 32.");
  }

  line(from, to) {
    Object.assign(this.pen, { strokeStyle: this.colour, lineWidth: this.width, lineCap: "round", lineJoin: "round" });
    this.pen.beginPath();
    this.pen.moveTo(from.x, from.y);
    this.pen.lineTo(to.x, to.y + 0.01); // a line of no length would not be drawn
    this.pen.stroke();
  }

  changed() {
    this.empty = false;
    this.onTrouble("");
    this.onChange();
  }

  // undo --------------------------------------------------------------------------------------------------------------

  remember() {
    this.past.push({ pixels: this.pen.getImageData(0, 0, this.side, this.side), empty: this.empty });
    if (this.past.length > MOST_UNDO) this.past.shift();
    this.undo.disabled = false;
  }

  stepBack() {
    const before = this.past.pop();
    if (!before) return;
    this.pen.putImageData(before.pixels, 0, 0);
    this.empty = before.empty;
    this.undo.disabled = this.past.length === 0;
    this.onTrouble("");
    this.onChange();
  }

  wipe() {
    this.pictures += 1; // what is still being read comes too late
    this.remember();
    this.pen.fillStyle = "white";
    this.pen.fillRect(0, 0, this.side, this.side);
    this.empty = true;
    this.onTrouble("");
    this.onChange();
  }

  // pictures ----------------------------------------------------------------------------------------------------------

  /** Pictures may be dropped anywhere: elsewhere a browser would leave the page for them. They may also be pasted. */
  acceptPictures() {
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    for (const kind of ["dragleave", "drop"]) {
      document.addEventListener(kind, () => document.body.classList.remove("dropping"));
    }
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const file = event.dataTransfer.files[0];
      this.onPicture();
      if (file) this.readFile(file);
      else this.onTrouble("What was dropped is no file; save the picture first, then drop the file.");
    });
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
      if (!file) return;
      this.onPicture();
      this.readFile(file);
    });
  }

  /** Put a picture file on the canvas. Says so where it cannot be read; then the drawing is as it was. */
  async readFile(file) {
    this.pictures += 1;
    const number = this.pictures;
    const name = file.name || "The picture";
    const refuse = (reason) => this.onTrouble(`${name} ${reason} The drawing is as it was.`);
    if (file.size > LARGEST_FILE) {
      return refuse(`is too large: ${Math.round(file.size / 1e6)} MB, where ${LARGEST_FILE / 1e6} MB are the most.`);
    }
    const picture = await createImageBitmap(file).catch(() => null);
    if (number !== this.pictures) { // something newer is on the canvas, or on its way to it
      picture?.close();
    } else if (!picture) {
      refuse("is not a picture that this browser can read; it may be damaged, or far too large.");
    } else if (picture.width * picture.height > LARGEST_PICTURE) {
      refuse(`is too large: ${picture.width} × ${picture.height} pixels.`);
      picture.close();
    } else {
      this.place(picture);
    }
  }

  /** Put a picture on the canvas: centred, cropped to a square, on white. */
  place(picture) {
    this.remember();
    const side = Math.min(picture.width, picture.height);
    this.pen.fillStyle = "white"; // behind what is transparent
    this.pen.fillRect(0, 0, this.side, this.side);
    this.pen.imageSmoothingEnabled = side > this.size; // small ones stay squares
    this.pen.imageSmoothingQuality = "high";
    this.pen.drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side,
                       0, 0, this.side, this.side);
    picture.close();
    this.changed();
  }

  /** Return what the model reads: RGB bytes [3 size size], each the mean of a square of the canvas. */
  read() {
    const { data } = this.pen.getImageData(0, 0, this.side, this.side);
    const { size, factor, side } = this;
    const bytes = new Uint8Array(3 * size * size);
    for (let y = 0; y < size; y++) {
      for (let x = 0; x < size; x++) {
        for (let c = 0; c < 3; c++) {
          let sum = 0;
          for (let j = 0; j < factor; j++) {
            for (let i = 0; i < factor; i++) sum += data[4 * ((y * factor + j) * side + x * factor + i) + c];
          }
          bytes[3 * (y * size + x) + c] = Math.round(sum / factor ** 2);
        }
      }
    }
    return bytes;
  }

  /** Put back what `read` returned; reading it again gives the same bytes. */
  write(bytes) {
    this.pictures += 1;
    this.remember();
    for (let i = 0; i < this.size ** 2; i++) {
      const [r, g, b] = bytes.subarray(3 * i, 3 * i + 3);
      this.pen.fillStyle = `rgb(${r} ${g} ${b})`;
      this.pen.fillRect((i % this.size) * this.factor, Math.floor(i / this.size) * this.factor, this.factor,
                        this.factor);
    }
    this.changed();
  }
}
