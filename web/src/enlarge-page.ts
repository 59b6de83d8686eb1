import "img-comparison-slider";
import "img-comparison-slider/dist/styles.css";

import { byId, run, show, start } from "./page";

const model = byId<HTMLSelectElement>("model");
const file = byId<HTMLInputElement>("file");
const slider = byId<HTMLElement & { value: number }>("slider");
const before = byId<HTMLImageElement>("before");
const after = byId<HTMLImageElement>("after");
let picture: File | null = null;

function enlarge(): void {
  if (picture !== null) run({ picture }, Number(model.value), `Enlarging ${picture.name}…`);
}

function choose(files: FileList | null | undefined): void {
  picture = files?.[0] ?? picture;
  if (files?.length) enlarge();
}

function describeDivider(): void {
  const share = Math.round(slider.value);
  slider.setAttribute("aria-valuenow", String(share));
  slider.setAttribute("aria-valuetext", `${share}% original`);
}

export function startEnlarging(): void {
  model.addEventListener("change", enlarge);
  file.addEventListener("change", () => {
    choose(file.files);
    file.value = ""; // so that the same picture can be chosen again
  });
  slider.addEventListener("slide", describeDivider);
  document.addEventListener("paste", (event) => choose(event.clipboardData?.files));
  for (const type of ["dragover", "dragleave", "drop"] as const)
    document.addEventListener(type, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dropping", type === "dragover");
      if (type === "drop") choose(event.dataTransfer?.files);
    });
  start({
    name: "enlarge",
    listed: (models) => {
      model.append(...models.map(({ name }, at) => new Option(name, String(at))));
      enlarge(); // a picture that was chosen before
    },
    finished: ({ picture: large, width, height, seconds }) => {
      for (const image of [before, after]) [image.width, image.height] = [width, height];
      byId("comparison").style.maxInlineSize = `max(20rem, ${width}px)`;
      slider.value = 50;
      describeDivider();
      show(picture!, before);
      const [size, rate] = [`${width}×${height}`, ((width * height) / 1e6 / seconds).toPrecision(2)];
      return {
        figures: `${size} pixels in ${seconds.toFixed(1)} s, ${rate} megapixels a second.`,
        file: `${picture!.name.replace(/\.[^.]*$/, "")}_${width}x${height}.png`,
        address: show(large, after),
      };
    },
  });
}
