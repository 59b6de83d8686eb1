/** The page has a task: to enlarge a picture, or with the address "?draw" to draw images. */

import "@picocss/pico/css/pico.classless.min.css";

import { startDrawing } from "./draw-page";
import { startEnlarging } from "./enlarge-page";
import "./style.css";

const drawing = new URLSearchParams(location.search).has("draw");
document.querySelector(`nav a[href="${drawing ? "?draw" : "?"}"]`)!.setAttribute("aria-current", "page");
if (drawing) startDrawing();
else startEnlarging();
