/** What the page and its worker tell each other. */

export interface ModelFile {
  name: string;
  file: string;
}

export type ToWorker =
  | { type: "load"; models: ModelFile[]; base: string; backend: string | null }
  | { type: "enlarge"; job: number; model: number; picture: Blob }
  | { type: "cancel"; job: number };

export type FromWorker =
  | { type: "ready"; backend: string }
  | { type: "unusable"; message: string } // nothing can be enlarged
  | { type: "progress"; job: number; done: number; total: number }
  | { type: "done"; job: number; picture: Blob; width: number; height: number; seconds: number }
  | { type: "failed"; job: number; message: string }
  | { type: "cancelled"; job: number };
