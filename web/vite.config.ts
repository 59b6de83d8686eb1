import { defaultClientConditions, defineConfig } from "vite";

export default defineConfig({
  base: "./", // the page works in any folder of a server
  build: {
    outDir: "../binarize/web/page",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
  },
  worker: { format: "es" },
  // WebAssembly stays in files of its own, which threads load too.
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions] },
});
