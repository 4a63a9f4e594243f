// Browsers start no worker from a page on disk, so there the theme's search runs in a frame: as iframe-worker does.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true });
      this.loaded = new Promise((done) => this.frame.addEventListener("load", done));
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      addEventListener("message", ({ source, data }) => {
        if (source === inside) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      inside.document.open();
      inside.document.write(`<script>postMessage = (data) => parent.postMessage(data, "*");</script><script src="${url}"></script>`);
      inside.document.close();
    }

    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
