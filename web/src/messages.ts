/** What a page and its worker tell each other. */

import type { Sampling } from "./model";

export type ModelFile = { name: string; file: string };

/** A picture to enlarge, or how many images to draw: of a class, or with null of all classes in turn. */
export type Job = { picture: Blob } | { count: number; label: number | null; seed: number };

export type ToWorker =
  | { type: "load"; models: ModelFile[]; base: string; backend: string | null }
  | { type: "run"; job: number; model: number; request: Job }
  | { type: "cancel"; job: number };

export type Done = { picture: Blob; width: number; height: number; seconds: number };

export type FromWorker =
  | { type: "ready"; backend: string; settings: Sampling } // of the first model
  | { type: "unusable"; message: string } // no model can be run
  | { type: "progress"; job: number; done: number; total: number }
  | { type: "done"; job: number; result: Done }
  | { type: "failed"; job: number; message: string }
  | { type: "cancelled"; job: number };
