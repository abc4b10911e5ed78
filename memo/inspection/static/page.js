// The page of `memo ui`.
import { serve } from "./view.js";

const root = document.getElementById("memo");
serve(root);
