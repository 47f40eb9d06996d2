/** As much of a document as the page needs to show Markdown, and a short form of it for tests. */

class FakeText {
  constructor(data) {
    this.data = data;
  }

  get length() {
    return this.data.length;
  }

  appendData(data) {
    this.data += data;
  }

  html() {
    return this.data;
  }
}

class FakeElement {
  attributes = {};
  children = [];
  parent = null;

  constructor(tag) {
    this.tag = tag;
  }

  get firstChild() {
    return this.children[0];
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  addEventListener() {}

  append(...nodes) {
    for (const node of nodes) {
      const child = typeof node === "string" ? new FakeText(node) : node;
      child.remove?.();
      child.parent = this;
      this.children.push(child);
    }
  }

  remove() {
    if (this.parent) this.parent.children.splice(this.parent.children.indexOf(this), 1);
    this.parent = null;
  }

  replaceWith(node) {
    this.parent.children[this.parent.children.indexOf(this)] = node;
    node.parent = this.parent;
    this.parent = null;
  }

  querySelector(tag) {
    for (const child of this.children) {
      const found = child.tag === tag ? child : child.querySelector?.(tag);
      if (found) return found;
    }
    return null;
  }

  html() {
    const { tag, attributes, children } = this;
    const inside = children.map((child) => child.html()).join("");
    if (tag === "br" || tag === "hr") return `<${tag}>`;
    if (tag === "a") return `<a ${attributes.href}>${inside}</a>`;
    if (attributes.class === "code") return `<pre>${children[0].children[0].html().slice(6, -7)}:${children[1].children[0].children[0].html()}</pre>`;
    if (attributes.class === "table") {
      const rows = [...children[0].children[0].children, ...children[0].children[1].children];
      const cells = (row) => row.children.map((cell) => cell.children.map((node) => node.html()).join("")).join("|");
      return `<table>${rows.map(cells).join(" / ")}</table>`;
    }
    return `<${tag}${attributes.start ? ` start=${attributes.start}` : ""}>${inside}</${tag}>`;
  }
}

export class FakeDocument {
  createElement(tag) {
    return new FakeElement(tag);
  }

  createElementNS(namespace, tag) {
    return new FakeElement(tag);
  }

  createTextNode(data) {
    return new FakeText(data);
  }
}
