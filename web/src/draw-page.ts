import { byId, run, show, start } from "./page";

const form = byId<HTMLFormElement>("draw");
const kinds = byId<HTMLSelectElement>("class");
const drawn = byId<HTMLImageElement>("drawn");

export function startDrawing(): void {
  [byId("comparison").hidden, drawn.hidden] = [true, false];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const [count, seed] = [Number(byId<HTMLInputElement>("count").value), Number(byId<HTMLInputElement>("seed").value)];
    drawn.alt = `Images: ${count}, class: ${kinds.selectedOptions[0]!.text}, seed: ${seed}`;
    run({ count, seed, label: kinds.value === "" ? null : Number(kinds.value) }, 0, "Drawing…");
  });
  start({
    name: "draw",
    ready: (settings) => {
      const names = "classes" in settings ? (settings.classes ?? []) : [];
      const options = names.map((name, label) => new Option(name, String(label)));
      if (kinds.length === 1) kinds.append(...options); // it is ready again when WebAssembly replaces WebGPU
      byId<HTMLButtonElement>("start").disabled = false;
    },
    finished: ({ picture, width, height, seconds }) => {
      [drawn.width, drawn.height] = [width, height];
      const figures = `${drawn.alt}. It took ${seconds.toFixed(1)} s.`;
      return { figures, file: "images.png", address: show(picture, drawn) };
    },
  });
}
